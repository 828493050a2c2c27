"""Sampling on the GPU: passes over a row instead of a sort, and no word to a host.

A token's distance is (largest logit - its logit) / temperature, its weight exp(-distance): 1 for
the likeliest. Which tokens stay is a bound on the distance, and how many of those that lie exactly
on it stay too, the lowest ids first. The bound is searched with three trial distances a pass, so
that a bracket shrinks to a quarter, until all tokens in it lie at one distance.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import (
    cdiv,
    launch,
    launch_options,
    next_power_of_2,
    release_successor,
    supports_pdl,
    wait_for_predecessor,
)

# Logits of a step of a pass: 8 a thread, which keeps the search within its registers.
BLOCK = 4096
# Logits of a program that looks for their largest.
PEAK_BLOCK = 2048
# exp of less is 0 in float32: a token further away can never be drawn.
FARTHEST = tl.constexpr(104.0)
SMALLEST_TEMPERATURE = tl.constexpr(1e-30)


@triton.jit
def _distances(row, ids, vocab, largest, temperature):
    logits = tl.load(row + ids, mask=ids < vocab, other=float("-inf"))
    return (largest - logits) / temperature


@triton.jit
def _peaks_kernel(logits, peaks, ids, vocab, stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Grid (rows, blocks of a row): each block's largest logit and the first id that has it.

    A NaN counts as infinity. One program alone would take 30 µs for a row.
    """
    index = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    release_successor(PDL)
    wait_for_predecessor(PDL)
    values = tl.load(logits + index * stride + lane, mask=lane < vocab, other=float("-inf"))
    values = tl.where(values != values, float("inf"), values)
    largest = tl.max(values, axis=0)
    place = index * tl.num_programs(1) + tl.program_id(1)
    tl.store(peaks + place, largest)
    tl.store(ids + place, tl.min(tl.where(values == largest, lane, vocab), axis=0))


@triton.jit
def _largest(peaks, ids, vocab, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit of a row and the first id that has it, from its blocks' [COUNT]."""
    lane = tl.arange(0, BLOCK)
    values = tl.load(peaks + lane, mask=lane < COUNT, other=float("-inf"))
    first = tl.load(ids + lane, mask=lane < COUNT, other=0)
    largest = tl.max(values, axis=0)
    return largest, tl.min(tl.where((values == largest) & (lane < COUNT), first, vocab), axis=0)


@triton.jit
def _search(
    row,
    vocab,
    largest,
    temperature,
    wanted,
    farthest,
    BY_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The least distance within which lies `wanted`, of tokens or of weight, and what is nearer.

    Everything within `farthest` is taken to hold `wanted`.
    """
    lane = tl.arange(0, BLOCK)
    # The bracket: what lies within near, `nearer`, is not enough; what lies within far is.
    near = farthest * 0.0 - 1.0
    nearer = farthest * 0.0
    far = farthest
    # Of all distances most are large, but the bound is seldom.
    first = tl.minimum(far * 0.25, 2.0)
    second = tl.minimum(far * 0.5, 6.0)
    third = tl.minimum(far * 0.75, 14.0)
    spread = farthest > 0.0
    while spread:
        in_first = tl.zeros([BLOCK], tl.float32)
        in_second = tl.zeros([BLOCK], tl.float32)
        in_third = tl.zeros([BLOCK], tl.float32)
        low = tl.full([BLOCK], float("inf"), tl.float32)
        high = tl.full([BLOCK], -1.0, tl.float32)
        for start in range(0, vocab, BLOCK):
            distance = _distances(row, start + lane, vocab, largest, temperature)
            if BY_WEIGHT:
                amount = tl.exp(-distance)
            else:
                amount = tl.full([BLOCK], 1.0, tl.float32)
            in_first += tl.where(distance <= first, amount, 0.0)
            in_second += tl.where(distance <= second, amount, 0.0)
            in_third += tl.where(distance <= third, amount, 0.0)
            inside = (distance > near) & (distance <= far)
            low = tl.minimum(low, tl.where(inside, distance, float("inf")))
            high = tl.maximum(high, tl.where(inside, distance, -1.0))
        lowest, highest = tl.min(low, axis=0), tl.max(high, axis=0)
        spread = lowest < highest
        if lowest <= highest:  # else rounding left nothing in the bracket
            far = tl.minimum(far, highest)
        if spread:
            sum_first = tl.sum(in_first, axis=0)
            sum_second = tl.sum(in_second, axis=0)
            sum_third = tl.sum(in_third, axis=0)
            if sum_first >= wanted:
                far = tl.minimum(far, first)
            elif sum_second >= wanted:
                near, nearer, far = first, sum_first, tl.minimum(far, second)
            elif sum_third >= wanted:
                near, nearer, far = second, sum_second, tl.minimum(far, third)
            else:
                near, nearer = third, sum_third
            # Of neighbouring floats `first` is the lower one: each pass takes something away.
            bottom = tl.maximum(near, lowest)
            first = bottom + (far - bottom) * 0.25
            second = bottom + (far - bottom) * 0.5
            third = bottom + (far - bottom) * 0.75
    return far, nearer


@triton.jit
def _number_within(row, vocab, largest, temperature, bound, BLOCK: tl.constexpr):
    """How many tokens are as near as bound."""
    lane = tl.arange(0, BLOCK)
    number = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        distance = _distances(row, start + lane, vocab, largest, temperature)
        number += tl.where(distance <= bound, 1.0, 0.0)
    return tl.sum(number, axis=0)


@triton.jit
def _weight_within(
    row, vocab, largest, temperature, bound, at_bound, min_p, BLOCK: tl.constexpr
):
    """What the tokens weigh that are nearer than bound, `at_bound` that lie on it included."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        distance = _distances(row, start + lane, vocab, largest, temperature)
        weight = tl.exp(-distance)
        total += tl.where((distance < bound) & (weight >= min_p), weight, 0.0)
    # As a tensor, for the same instruction: a token's weight must have the same bits everywhere.
    on_it = tl.max(tl.exp(-(tl.zeros([BLOCK], tl.float32) + bound)), axis=0)
    return tl.sum(total, axis=0) + tl.where(on_it >= min_p, on_it * at_bound, 0.0)


@triton.jit
def _pick(
    row, vocab, largest, temperature, bound, at_bound, min_p, wanted, likeliest, BLOCK: tl.constexpr
):
    """The id at which the cumulated weight of what stays passes `wanted`, in ids' order.

    The likeliest should rounding run past the end: sums of other orders differ in the last bits,
    and the last id with any weight may be one of next to none.
    """
    lane = tl.arange(0, BLOCK)
    cumulated = wanted * 0.0
    seen = at_bound * 0.0  # tokens on the bound so far
    token = likeliest
    start = vocab * 0
    while start < vocab:
        ids = start + lane
        distance = _distances(row, ids, vocab, largest, temperature)
        on_bound = distance == bound
        count = tl.sum(on_bound.to(tl.float32), axis=0)
        stays = distance < bound
        if seen + count <= at_bound:
            stays = stays | on_bound
        elif seen < at_bound:
            rank = seen + tl.cumsum(on_bound.to(tl.float32), axis=0)
            stays = stays | (on_bound & (rank <= at_bound))
        seen += count
        weight = tl.exp(-distance)
        weight = tl.where(stays & (weight >= min_p), weight, 0.0)
        here = tl.sum(weight, axis=0)
        if cumulated + here > wanted:
            passed = (cumulated + tl.cumsum(weight, axis=0) > wanted) & (weight > 0.0)
            found = tl.min(tl.where(passed, ids, vocab), axis=0)
            token = tl.where(found < vocab, found, likeliest)
            start = vocab
        cumulated += here
        start += BLOCK
    return token


@triton.jit
def _sample_kernel(
    logits,
    peaks,
    peak_ids,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    uniforms,
    out,
    vocab,
    stride,
    PEAKS: tl.constexpr,  # of a row
    PEAKS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * stride
    release_successor(PDL)
    wait_for_predecessor(PDL)
    largest, token = _largest(
        peaks + index * PEAKS, peak_ids + index * PEAKS, vocab, PEAKS, PEAKS_BLOCK
    )
    temperature = tl.load(temperatures + index)
    if tl.abs(largest) == float("inf"):
        token = vocab * 0 - 1
    elif temperature > 0.0:
        temperature = tl.maximum(temperature, SMALLEST_TEMPERATURE)
        top_k = tl.load(top_ks + index)
        top_p = tl.load(top_ps + index)
        min_p = tl.load(min_ps + index)
        bound = largest * 0.0 + FARTHEST
        at_bound = largest * 0.0 + vocab  # how many tokens on the bound stay
        if top_k < vocab:
            wanted = tl.maximum(top_k, 1).to(tl.float32)
            # Banned tokens lie farther than everything; the others may be fewer than wanted.
            if wanted < _number_within(row, vocab, largest, temperature, bound, BLOCK):
                bound, nearer = _search(
                    row, vocab, largest, temperature, wanted, bound, False, BLOCK
                )
                at_bound = wanted - nearer
        if top_p < 1.0:
            # Without min_p: of what top_k left.
            total = _weight_within(row, vocab, largest, temperature, bound, at_bound, 0.0, BLOCK)
            wanted = total * top_p
            nearest, nearer = _search(
                row, vocab, largest, temperature, wanted, bound, True, BLOCK
            )
            # A token stays if those before it do not reach what is wanted.
            needed = tl.maximum(tl.ceil((wanted - nearer) / tl.exp(-nearest)), 1.0)
            at_bound = tl.where(nearest < bound, needed, tl.minimum(needed, at_bound))
            bound = nearest
        total = _weight_within(row, vocab, largest, temperature, bound, at_bound, min_p, BLOCK)
        wanted = total * tl.load(uniforms + index)
        token = _pick(
            row, vocab, largest, temperature, bound, at_bound, min_p, wanted, token, BLOCK
        )
    tl.store(out + index, token.to(tl.int64))


@triton.jit
def _resolve_kernel(token_ids, drawn, out, tokens, BLOCK: tl.constexpr, PDL: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < tokens
    release_successor(PDL)
    wait_for_predecessor(PDL)
    token = tl.load(token_ids + index, mask=mask, other=0)
    referred = tl.load(drawn + tl.maximum(-1 - token, 0), mask=mask & (token < 0), other=0)
    tl.store(out + index, tl.where(token < 0, tl.maximum(referred, 0), token), mask=mask)


def resolve_tokens(token_ids: Tensor, drawn: Tensor) -> Tensor:
    """See `kernels.ops.resolve_tokens`."""
    out = torch.empty_like(token_ids)
    pdl = supports_pdl(token_ids)
    launch(
        _resolve_kernel,
        (cdiv(len(token_ids), 128),),
        token_ids,
        drawn,
        out,
        len(token_ids),
        BLOCK=128,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    return out


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
) -> Tensor:
    """See `kernels.ops.sample`. Of equal probabilities the lower id ranks first.

    Raises:
        ValueError: logits are not float32 [S, vocab].
    """
    if logits.dim() != 2 or logits.dtype is not torch.float32:
        raise ValueError(f"sample of logits {logits.dtype} {list(logits.shape)}")
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    count = cdiv(vocab, PEAK_BLOCK)
    peaks = torch.empty(rows, count, dtype=torch.float32, device=logits.device)
    peak_ids = torch.empty(rows, count, dtype=torch.int32, device=logits.device)
    pdl = supports_pdl(logits)
    launch(
        _peaks_kernel,
        (rows, count),
        logits,
        peaks,
        peak_ids,
        vocab,
        logits.stride(0),
        BLOCK=PEAK_BLOCK,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    launch(
        _sample_kernel,
        (rows,),
        logits,
        peaks,
        peak_ids,
        temperature.contiguous(),
        top_k.contiguous(),
        top_p.contiguous(),
        min_p.contiguous(),
        uniform.contiguous(),
        out,
        vocab,
        logits.stride(0),
        PEAKS=count,
        PEAKS_BLOCK=next_power_of_2(count),
        BLOCK=min(BLOCK, next_power_of_2(vocab)),
        PDL=pdl,
        num_warps=16,
        **launch_options(pdl),
    )
    return out
