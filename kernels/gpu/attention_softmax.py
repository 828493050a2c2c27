"""The online softmax of the attention kernels (Milakov & Gimelshein 2018), and its merging."""

from __future__ import annotations

import triton
import triton.language as tl

# Whole numbers of values are multiplied by probability * scale, which in float16 would be lost
# below 6e-8; times 256, a scale of 1e-3 still leaves probabilities down to 1e-6 their weight.
LIFT = tl.constexpr(256.0)


@triton.jit
def softmax_step(
    scores, valid, m, totals, offsets, v_scale, v_zero, softmax_scale, BITS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """(probabilities of a tile, what earlier sums shrink by, m, totals, offsets).

    scores [BLOCK_M, BLOCK_N] not yet scaled; m [BLOCK_M] running maximum (scaled, base 2); totals
    sum of probabilities, offsets of probability * zero of the values, either a row [BLOCK_M] or
    column by column [BLOCK_M, BLOCK_N]. The probabilities returned are times LIFT * v_scale if the
    values are quantized. The scaling is spelled out as fma so that masked and unmasked tiles round
    alike.
    """
    if MASKED:
        scores = tl.where(valid, scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1) * softmax_scale)
    # A row that has seen nothing yet: -inf less -inf would be NaN.
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(tl.fma(scores, softmax_scale + tl.zeros_like(scores), 0.0 - m_safe[:, None]))
    alpha = tl.exp2(m - m_safe)
    by_column: tl.constexpr = len(totals.shape) == 2
    totals = totals * alpha[:, None] + p if by_column else totals * alpha + tl.sum(p, 1)
    if BITS < 16:
        shift = p * v_zero[None, :]
        if by_column:
            offsets = offsets * alpha[:, None] + shift
        else:
            offsets = offsets * alpha + tl.sum(shift, 1)
        p = p * (v_scale * LIFT)[None, :]
    return p, alpha, m_new, totals, offsets


@triton.jit
def add_values(
    p, alpha, a, b, c, d, va, vb, vc, vd, BITS: tl.constexpr, PRECISION: tl.constexpr
):
    """Parts a, b, c, d [BLOCK_M, WIDTH], shrunk by alpha, plus p times the values' parts."""
    alpha = alpha[:, None]
    p = p.to(va.dtype)
    a = tl.dot(p, va, a * alpha, input_precision=PRECISION)
    if BITS < 16:
        b = tl.dot(p, vb, b * alpha, input_precision=PRECISION)
    if BITS == 4:
        c = tl.dot(p, vc, c * alpha, input_precision=PRECISION)
        d = tl.dot(p, vd, d * alpha, input_precision=PRECISION)
    return a, b, c, d


@triton.jit
def merge(m, total, a, b, c, d, score, va, vb, vc, vd, BITS: tl.constexpr):
    """Add one token, of scaled score [BLOCK_M] and value in parts [1, WIDTH], to a softmax."""
    m_new = tl.maximum(m, score)
    alpha = tl.exp2(m - m_new)
    beta = tl.exp2(score - m_new)
    total = total * alpha + beta
    a = a * alpha[:, None] + beta[:, None] * va
    if BITS < 16:
        b = b * alpha[:, None] + beta[:, None] * vb
    if BITS == 4:
        c = c * alpha[:, None] + beta[:, None] * vc
        d = d * alpha[:, None] + beta[:, None] * vd
    return m_new, total, a, b, c, d


@triton.jit
def combine(
    out_ptr, partial_ptr, stats_ptr, first, count, GROUP: tl.constexpr, D: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Write [GROUP, D] at out_ptr from `count` partial results, CHUNK at a time, in their order.

    Result i of query head h is number first + i * GROUP + h of partial_ptr [.., D] and stats_ptr
    [.., 2] (maximum, sum). They are read past L1, which may hold what an earlier layer left there.
    """
    rows = tl.arange(0, triton.next_power_of_2(GROUP))
    columns = tl.arange(0, triton.next_power_of_2(D))
    used = (rows < GROUP)[:, None] & (columns < D)[None, :]
    m = tl.full(rows.shape, float("-inf"), tl.float32)
    total = tl.zeros(rows.shape, tl.float32)
    sums = tl.zeros(used.shape, tl.float32)
    for start in range(0, count, CHUNK):
        results = start + tl.arange(0, CHUNK)
        at = first + results[:, None] * GROUP + rows[None, :]
        there = (results < count)[:, None] & (rows < GROUP)[None, :]
        peaks = tl.load(stats_ptr + at * 2, there, other=float("-inf"), cache_modifier=".cg")
        weights = tl.load(stats_ptr + at * 2 + 1, there, other=0.0, cache_modifier=".cg")
        values = tl.load(
            partial_ptr + (at * D)[:, :, None] + columns[None, None, :],
            there[:, :, None] & (columns < D)[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        m_new = tl.maximum(m, tl.max(peaks, 0))
        m_safe = tl.where(rows < GROUP, m_new, 0.0)
        alpha = tl.exp2(m - m_safe)
        beta = tl.exp2(peaks - m_safe[None, :])
        total = total * alpha + tl.sum(weights * beta, 0)
        sums = sums * alpha[:, None] + tl.sum(values * beta[:, :, None], 0)
        m = m_new
    out = sums / tl.where(rows < GROUP, total, 1.0)[:, None]
    at = (rows * D)[:, None] + columns[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=used)
