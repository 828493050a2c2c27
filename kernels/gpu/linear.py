"""Products with 16-bit weights: own kernels where they are faster than cuBLAS, else cuBLAS.

One token: a sum of products, a few rows of the weight a program. A few tokens: `few_tokens` for
narrow results, and for very wide ones a tile of Yᵀ = W Xᵀ, the weight as the first operand, so that
its rows and not the tokens fill the tile. Every program reads all of K, so nothing is added up
between programs. Weights are read while the kernel before still runs: that one must not write them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.few_tokens import Chunks, few_tokens, fits_chunks
from kernels.gpu.launch import (
    cdiv,
    launch,
    launch_options,
    release_successor,
    supports_pdl,
    wait_for_predecessor,
)


class Tile(NamedTuple):
    """Shape of one program's share of a product, and how it is run."""

    rows: int  # of the weight
    tokens: int
    depth: int  # columns of the weight a step
    warps: int
    stages: int


class Strip(NamedTuple):
    """Shape of one program's share of a product with one token."""

    rows: int
    depth: int
    warps: int


# Lines of 128 bytes of each row to fetch while the kernel before this one still runs.
PREFETCHED_LINES = 8


@triton.jit
def prefetch_rows(rows, columns, LINES: tl.constexpr):
    """Ask for the first LINES cache lines of some rows, to be in L2 when they are read.

    rows [BLOCK] pointers, each to `columns` elements. Inline PTX: not for the interpreter.
    """
    WIDTH: tl.constexpr = 1024 // rows.dtype.element_ty.primitive_bitwidth
    line = tl.arange(0, LINES) * WIDTH
    place = rows[:, None] + tl.minimum(line, columns - 1)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [place.to(tl.int64, bitcast=True)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def weight_times_tokens(
    weight_rows,
    token_rows,
    token_mask,
    columns,
    accumulator,
    EVEN: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """accumulator + W Xᵀ [BLOCK_ROWS, BLOCK_TOKENS], the columns in order.

    weight_rows [BLOCK_ROWS] and token_rows [BLOCK_TOKENS] point to contiguous rows of `columns`
    elements; EVEN: that is a multiple of BLOCK_DEPTH.
    """
    depth = tl.arange(0, BLOCK_DEPTH)
    w_place = weight_rows[:, None] + depth[None, :]
    x_place = token_rows[:, None] + depth[None, :]
    for start in range(0, columns, BLOCK_DEPTH):
        if EVEN:
            w = tl.load(w_place)
            x = tl.load(x_place, mask=token_mask[:, None], other=0)
        else:
            within = (start + depth < columns)[None, :]
            w = tl.load(w_place, mask=within, other=0)
            x = tl.load(x_place, mask=token_mask[:, None] & within, other=0)
        accumulator = tl.dot(
            w, tl.trans(x), accumulator, input_precision="ieee", out_dtype=accumulator.dtype
        )
        w_place += BLOCK_DEPTH
        x_place += BLOCK_DEPTH
    return accumulator


@triton.jit(do_not_specialize=["tokens"])
def _matmul_kernel(
    x,
    weight,
    bias,
    out,
    tokens,
    rows,
    columns,
    x_stride,
    weight_stride,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    # Programs that run side by side share a tile of the weight: it is read once from memory.
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token_mask, row_mask = token < tokens, row < rows
    # Rows past the end read the last one, which needs no mask, and are not stored.
    weight_rows = weight + tl.minimum(row, rows - 1).to(tl.int64) * weight_stride
    release_successor(PDL)
    if PDL:
        prefetch_rows(weight_rows, columns, LINES)
    wait_for_predecessor(PDL)
    accumulator = weight_times_tokens(
        weight_rows,
        x + token.to(tl.int64) * x_stride,
        token_mask,
        columns,
        tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], dtype=tl.float32),
        EVEN,
        BLOCK_DEPTH,
    )
    if HAS_BIAS:
        b = tl.load(bias + row, mask=row_mask, other=0.0).to(tl.float32)
        accumulator += b[:, None]
    place = out + token.to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(
        place, accumulator.to(out.dtype.element_ty), mask=token_mask[None, :] & row_mask[:, None]
    )


@triton.jit
def _one_token_kernel(
    x,
    weight,
    bias,
    out,
    rows,
    weight_stride,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """One step's weights are in flight while the step before it is multiplied."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    depth = tl.arange(0, BLOCK_DEPTH)
    EVEN: tl.constexpr = COLUMNS % BLOCK_DEPTH == 0
    release_successor(PDL)
    place = weight + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * weight_stride
    place += depth[None, :]
    if EVEN:
        w = tl.load(place)
    else:
        w = tl.load(place, mask=(depth < COLUMNS)[None, :], other=0.0)
    wait_for_predecessor(PDL)
    products = tl.zeros([BLOCK_ROWS, BLOCK_DEPTH], dtype=tl.float32)
    for start in range(BLOCK_DEPTH, COLUMNS, BLOCK_DEPTH):
        if EVEN:
            following = tl.load(place + start)
        else:
            within = start + depth < COLUMNS
            following = tl.load(place + start, mask=within[None, :], other=0.0)
        v = tl.load(x + start - BLOCK_DEPTH + depth).to(tl.float32)
        products += w.to(tl.float32) * v[None, :]
        w = following
    last: tl.constexpr = (COLUMNS - 1) // BLOCK_DEPTH * BLOCK_DEPTH
    if EVEN:
        v = tl.load(x + last + depth).to(tl.float32)
    else:
        v = tl.load(x + last + depth, mask=last + depth < COLUMNS, other=0.0).to(tl.float32)
    products += w.to(tl.float32) * v[None, :]
    result = tl.sum(products, axis=1)
    if HAS_BIAS:
        result += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=row < rows)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, batch_invariant: bool = False
) -> Tensor:
    """See `kernels.ops.linear`.

    Raises:
        ValueError: shapes or dtypes of x, weight and bias do not fit.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"linear of x {list(x.shape)} and a weight {list(weight.shape)}")
    if x.dtype != weight.dtype:
        raise ValueError(f"linear of {x.dtype} and a weight of {weight.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"a bias {list(bias.shape)} for {weight.shape[0]} outputs")
    if batch_invariant:
        return matmul(x, weight, bias, INVARIANT_TILES[x.element_size()])
    tokens, rows = x.shape[0], weight.shape[0]
    if x.dtype is torch.float32 or weight.stride(1) != 1:
        return F.linear(x, weight, bias)
    if tokens == 1:
        return one_token(x, weight, bias, choose_strip(x.shape[1]))
    if tokens <= 8 and rows <= NARROW and fits_chunks(x) and fits_chunks(weight):
        return few_tokens(x, weight, bias, FEW_TOKENS)
    if 0 < tokens <= 16 and rows >= WIDE:
        return matmul(x, weight, bias, WIDE_TILE)
    if tokens < PROMPT:
        return F.linear(x, weight, bias)
    out = x.new_empty(tokens, rows)
    product_into(out, x, weight)
    return out if bias is None else out.add_(bias)


def product_into(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """x [T, K] times weight [N, K] into out [T, N], whose rows may lie apart, by cuBLAS."""
    rows = weight.shape[0]
    step = rows if x.shape[0] < PROMPT else slice_rows(rows, weight.shape[1], SLICE_BYTES)
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        torch.mm(x, weight[part].t(), out=out[:, part])


def slice_rows(rows: int, columns: int, size: int) -> int:
    """Rows of a slice of about `size` bytes of a 16-bit weight: all slices about alike."""
    whole = cdiv(rows, 64)
    slices = cdiv(whole, max(1, size // (2 * columns * 64)))
    return cdiv(whole, slices) * 64


def choose_strip(columns: int) -> Strip:
    """A share of a product with one token.

    On an H200, 12288, 22016 and 128256 rows of 4096 are read at 4.35, 4.46 and 4.58 TB/s (cuBLAS
    3.6, 3.9, 4.3), 4096 of 11008 at 3.9 (3.3): within 1 % of the best of 14 strips. Where more than
    a seventh of the steps would be idle, thinner strips are better: 5120 x 5120 takes 12.8 µs, 15.6
    otherwise (cuBLAS 17.1).
    """
    steps = cdiv(columns, STRIP.depth)
    return STRIP if 7 * columns >= 6 * steps * STRIP.depth else THIN_STRIP


# Of a weight that does not stay in an H200's L2 cache, cuBLAS loses a little with prompts: 22016 x
# 4096 takes 526 µs with 2048 tokens, in four slices 498; 4096 x 11008 takes 265, in two 254. With
# 1024 tokens slices gain nothing, and smaller ones lose.
PROMPT = 1536
SLICE_BYTES = 48 << 20
STRIP = Strip(2, 2048, 8)
THIN_STRIP = Strip(1, 2048, 4)
# Rows, of 2 to 16 tokens' products, where cuBLAS is slower than own kernels on an H200. 4 tokens:
# 4096 x 4096 takes 10.2 µs (cuBLAS 13.0), 4096 x 11008 24.4 (27.6), 3584 x 3584 8.2 (11.0), but
# 5120 x 5120 17.5 (17.2). 16 tokens: 32000 x 4096 takes 63 µs (66), 128256 x 4096 246 (263), but
# 22016 x 4096 47.2 (46.3).
NARROW = 4096
FEW_TOKENS = Chunks(1, 16, 2)
WIDE = 32000
WIDE_TILE = Tile(64, 16, 128, 4, 4)
# One tile for every number of tokens, by bytes of an element. On an H200, 4096 x 4096 and 22016 x
# 4096 take 20.9 and 57.8 µs with one token, where the best of six tiles take 18.9 and 53.4; with
# 2048 tokens they reach 461 and 408 TFLOP/s, where the best reach 522 and 451.
INVARIANT_TILES = {2: Tile(128, 64, 64, 4, 4), 4: Tile(64, 64, 32, 4, 3)}


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None, tile: Tile) -> Tensor:
    """x [T, K] times weight [N, K], by programs of one tile each; all of K in order."""
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    tokens, columns = x.shape
    rows = weight.shape[0]
    out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    pdl = supports_pdl(x)
    grid = (cdiv(tokens, tile.tokens), cdiv(rows, tile.rows))
    launch(
        _matmul_kernel,
        grid,
        x,
        weight,
        x if bias is None else bias,
        out,
        tokens,
        rows,
        columns,
        x.stride(0),
        weight.stride(0),
        HAS_BIAS=bias is not None,
        EVEN=columns % tile.depth == 0,
        BLOCK_ROWS=tile.rows,
        BLOCK_TOKENS=tile.tokens,
        BLOCK_DEPTH=tile.depth,
        LINES=PREFETCHED_LINES,
        PDL=pdl,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **launch_options(pdl),
    )
    return out


def one_token(x: Tensor, weight: Tensor, bias: Tensor | None, strip: Strip) -> Tensor:
    """x [1, K] times weight [N, K], by programs of a few rows each."""
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    rows, columns = weight.shape
    out = torch.empty(1, rows, dtype=x.dtype, device=x.device)
    pdl = supports_pdl(x)
    launch(
        _one_token_kernel,
        (cdiv(rows, strip.rows),),
        x,
        weight,
        x if bias is None else bias,
        out,
        rows,
        weight.stride(0),
        COLUMNS=columns,
        HAS_BIAS=bias is not None,
        BLOCK_ROWS=strip.rows,
        BLOCK_DEPTH=strip.depth,
        PDL=pdl,
        num_warps=strip.warps,
        **launch_options(pdl),
    )
    return out
