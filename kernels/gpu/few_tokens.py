"""Products of a few tokens: weights go from memory to registers to tensor cores, nothing between.

A program has a few blocks of 16 rows of the weight and all their columns, so that nothing is added
up between programs. Its warps take chunks of 64 bytes of the rows in turn. Lane 4r + c loads 16
bytes of row r; as the columns may come in any order, these are its part of operand A of mma
(m16n8k16, m16n8k32), and the same bytes of token r its part of B: no value passes through shared
memory. Tokens are operand B, eight wide; those that are missing cost nothing, since the memory is
what is waited for. The first loads are in flight before the kernel before this one has ended.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import (
    launch_options,
    release_successor,
    supports_pdl,
    wait_for_predecessor,
)

CHUNK = 64  # bytes of a row that a warp takes at a time
KINDS = {torch.float16: "f16", torch.bfloat16: "bf16", torch.int8: "s8"}


class Chunks(NamedTuple):
    """How the programs of a product share it."""

    blocks: int  # of 16 rows a program
    warps: int  # which take the chunks in turn
    ahead: int  # chunks a warp has in flight


@triton.constexpr_function
def _mma_asm(kind: str) -> str:
    """Two mma over a chunk of 16 rows and of 8 tokens; any order of the columns is as good.

    Operands by fours: $0 results, $4 words of row r, $8 of row r + 8, $12 of token r, $16 what the
    results are added to.
    """
    shape, result = ("m16n8k32", "s32") if kind == "s8" else ("m16n8k16", "f32")
    mma = f"mma.sync.aligned.{shape}.row.col.{result}.{kind}.{kind}.{result} {{$0, $1, $2, $3}}, "
    first = mma + "{$4, $8, $5, $9}, {$12, $13}, {$16, $17, $18, $19};"
    second = mma + "{$6, $10, $7, $11}, {$14, $15}, {$0, $1, $2, $3};"
    return first + "\n" + second


@triton.constexpr_function
def _mma_constraints(kind: str) -> str:
    """The results are written before the last of the inputs is read: "&"."""
    register = "r" if kind == "s8" else "f"
    return ",".join([f"=&{register}"] * 4 + ["r"] * 12 + [register] * 4)


@triton.jit
def _multiply_add(low, high, x, accumulator, KIND: tl.constexpr, ASM: tl.constexpr):
    """accumulator plus the product of 16 rows with 8 tokens; all [WARPS, 8, 16].

    low, high: words of rows r and r + 8; x: of token r. Of the results, element
    4c + i is row r + 8 * (i // 2), token 2c + i % 2: so the instruction leaves them.
    """
    if ASM:
        result = tl.inline_asm_elementwise(
            _mma_asm(KIND),
            _mma_constraints(KIND),
            [low, high, x, accumulator],
            dtype=accumulator.dtype,
            is_pure=True,
            pack=4,
        )
    else:
        both = tl.join(_plain_product(low, x, KIND), _plain_product(high, x, KIND))
        shape: tl.constexpr = (accumulator.shape[0], 8, 4, 2, 2)
        ordered = tl.permute(tl.reshape(both, shape), (0, 1, 2, 4, 3))
        result = accumulator + tl.reshape(ordered, accumulator.shape)
    return result


@triton.jit
def _plain_product(rows, x, KIND: tl.constexpr):
    """[WARPS, 8 rows, 8 tokens], for the interpreter."""
    total = tl.sum(_element(rows, 0, KIND)[:, :, None, :] * _element(x, 0, KIND)[:, None, :, :], 3)
    for i in tl.static_range(1, 4 if KIND == "s8" else 2):
        w = _element(rows, i, KIND)[:, :, None, :]
        total += tl.sum(w * _element(x, i, KIND)[:, None, :, :], axis=3)
    return total


@triton.jit
def _element(words, i: tl.constexpr, KIND: tl.constexpr):
    """Element i of each word, the lowest first."""
    if KIND == "s8":
        value = (words << (24 - 8 * i)) >> 24
    elif KIND == "bf16":
        value = ((words >> (16 * i)) << 16).to(tl.float32, bitcast=True)
    else:
        value = (words >> (16 * i)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def _load_words(place, chunk, CHUNKS: tl.constexpr, EVEN: tl.constexpr):
    """A chunk of a row of weights; read once, so it need not stay in a cache."""
    if EVEN:
        words = tl.load(place + chunk * 16, eviction_policy="evict_first")
    else:
        words = tl.load(
            place + chunk * 16, mask=chunk < CHUNKS, other=0, eviction_policy="evict_first"
        )
    return words


@triton.jit(do_not_specialize=["tokens"])
def _few_tokens_kernel(
    x,  # int32: words of two or four elements
    weight,  # int32
    bias,
    x_scales,
    weight_scales,
    out,
    tokens,
    rows,
    x_stride,  # words
    weight_stride,  # words
    CHUNKS: tl.constexpr,  # of a row
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,  # of the elements, as PTX calls it: f16, bf16, s8
    BLOCKS: tl.constexpr,  # of 16 rows
    TILES: tl.constexpr,  # of 8 tokens
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,  # chunks a warp loads before it uses the first
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    # Every load has this shape, so that all have one layout: lane 4r + c has [warp, r, 4c:4c + 4].
    warp = tl.arange(0, WARPS)[:, None, None]
    r = tl.arange(0, 8)[None, :, None]
    word = tl.arange(0, 16)[None, None, :]
    STEPS: tl.constexpr = (CHUNKS + WARPS - 1) // WARPS
    EVEN: tl.constexpr = CHUNKS % WARPS == 0
    SUM: tl.constexpr = tl.int32 if KIND == "s8" else tl.float32
    PARTS: tl.constexpr = 2 * BLOCKS  # rows r and r + 8 of each block
    base = tl.program_id(0) * (16 * BLOCKS)
    places = ()
    ring = ()
    accumulators = ()
    for part in tl.static_range(PARTS):
        row = tl.minimum(base + 8 * part + r, rows - 1).to(tl.int64)
        places = places + (weight + row * weight_stride + word,)
    for step in tl.static_range(min(AHEAD, STEPS)):
        for part in tl.static_range(PARTS):
            ring = ring + (_load_words(places[part], step * WARPS + warp, CHUNKS, EVEN),)
    for _ in tl.static_range(BLOCKS * TILES):
        accumulators = accumulators + (tl.zeros([WARPS, 8, 16], dtype=SUM),)
    release_successor(PDL)
    wait_for_predecessor(PDL)
    for step in tl.static_range(STEPS):
        chunk = step * WARPS + warp
        if step + AHEAD < STEPS:
            for part in tl.static_range(PARTS):
                following = chunk + AHEAD * WARPS
                ring = ring + (_load_words(places[part], following, CHUNKS, EVEN),)
        sums = ()
        for tile in tl.static_range(TILES):
            token = 8 * tile + r
            mask = (token < tokens) & (chunk < CHUNKS)
            xs = tl.load(x + token.to(tl.int64) * x_stride + chunk * 16 + word, mask, other=0)
            for block in tl.static_range(BLOCKS):
                low, high = ring[step * PARTS + 2 * block], ring[step * PARTS + 2 * block + 1]
                before = accumulators[tile * BLOCKS + block]
                sums = sums + (_multiply_add(low, high, xs, before, KIND, ASM),)
        accumulators = sums
    lane_row = tl.arange(0, 8)[:, None]
    element = tl.arange(0, 16)[None, :]
    for block in tl.static_range(BLOCKS):
        row = base + 16 * block + lane_row + 8 * (element % 4 // 2)
        for tile in tl.static_range(TILES):
            token = 8 * tile + 2 * (element // 4) + element % 2
            value = tl.sum(accumulators[tile * BLOCKS + block], axis=0).to(tl.float32)
            if KIND == "s8":
                value *= tl.load(x_scales + token, mask=token < tokens, other=0.0)
                value *= tl.load(weight_scales + row, mask=row < rows, other=0.0)
            if HAS_BIAS:
                value += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
            place = out + token.to(tl.int64) * rows + row
            mask = (row < rows) & (token < tokens)
            tl.store(place, value.to(out.dtype.element_ty), mask=mask)


def few_tokens(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    chunks: Chunks,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """x [T, K] times weight [N, K], both of one dtype of `KINDS` and both `fits_chunks`.

    scales: of int8 elements, float32 [T] and [N]. Returns [T, N] of out_dtype. Meant for T up to
    16: the tokens are read again for every 16 * chunks.blocks rows.
    """
    tokens, columns = x.shape
    rows = weight.shape[0]
    out = torch.empty(tokens, rows, dtype=out_dtype, device=x.device)
    elements = 4 // x.element_size()  # of a word
    pdl = supports_pdl(x)
    x_scales, weight_scales = (x, x) if scales is None else scales
    _few_tokens_kernel[(triton.cdiv(rows, 16 * chunks.blocks),)](
        x.view(torch.int32),
        weight.view(torch.int32),
        x if bias is None else bias,
        x_scales,
        weight_scales,
        out,
        tokens,
        rows,
        x.stride(0) // elements,
        weight.stride(0) // elements,
        CHUNKS=columns * x.element_size() // CHUNK,
        HAS_BIAS=bias is not None,
        KIND=KINDS[x.dtype],
        BLOCKS=chunks.blocks,
        TILES=triton.cdiv(tokens, 8),
        WARPS=chunks.warps,
        AHEAD=chunks.ahead,
        ASM=x.is_cuda,
        PDL=pdl,
        num_warps=chunks.warps,
        **launch_options(pdl),
    )
    return out


def fits_chunks(x: Tensor) -> bool:
    """Whether rows of x are whole chunks that start on 16 bytes."""
    size = x.element_size()
    return (
        x.shape[1] * size % CHUNK == 0
        and x.stride(1) == 1
        and x.stride(0) * size % 16 == 0
        and x.data_ptr() % 16 == 0
    )
