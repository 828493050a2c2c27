"""W8A8 products: tokens rounded to int8, int8 tensor cores, scales and bias on the way out.

Sums of whole numbers are exact in any order, and each sum is scaled by itself: a row's bits depend
neither on the other rows nor on the tile, so `batch_invariant` asks for nothing more.
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
from kernels.gpu.linear import PREFETCHED_LINES, Tile, prefetch_rows, weight_times_tokens
from kernels.packing import W8Weight

# Adding and taking away 1.5 * 2**23 rounds a small float32 to a whole number, halves to even.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def _quantize_kernel(
    x,
    quantized,
    scales,
    x_stride,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < COLUMNS
    release_successor(PDL)
    wait_for_predecessor(PDL)
    values = tl.load(x + token * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(values), axis=0), 1e-10), 127.0)
    rounded = (tl.div_rn(values, scale + tl.zeros_like(values)) + ROUNDER) - ROUNDER
    tl.store(quantized + token * COLUMNS + column, rounded.to(tl.int8), mask=mask)
    tl.store(scales + token, scale)


@triton.jit(do_not_specialize=["tokens"])
def _int8_matmul_kernel(
    x,
    x_scales,
    weight,
    weight_scales,
    bias,
    out,
    tokens,
    rows,
    columns,
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
        x + token.to(tl.int64) * columns,
        token_mask,
        columns,
        tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], dtype=tl.int32),
        EVEN,
        BLOCK_DEPTH,
    )
    x_scale = tl.load(x_scales + token, mask=token_mask, other=0.0)
    row_scale = tl.load(weight_scales + row, mask=row_mask, other=0.0)
    result = accumulator.to(tl.float32) * x_scale[None, :] * row_scale[:, None]
    if HAS_BIAS:
        result += tl.load(bias + row, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    place = out + token.to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(place, result.to(out.dtype.element_ty), mask=token_mask[None, :] & row_mask[:, None])


def linear_w8(
    x: Tensor, weight: W8Weight, bias: Tensor | None, batch_invariant: bool = False
) -> Tensor:
    """See `kernels.ops.linear_w8`. The bits are the same with and without `batch_invariant`.

    Raises:
        ValueError: shapes of x, weight and bias do not fit.
    """
    rows, columns = weight.qweight.shape
    if x.dim() != 2 or x.shape[1] != columns:
        raise ValueError(f"linear_w8 of x {list(x.shape)} and a weight {[rows, columns]}")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"a bias {list(bias.shape)} for {rows} outputs")
    quantized, scales = quantize_tokens(x)
    return int8_matmul(quantized, scales, weight, bias, x.dtype, choose_tile(x.shape[0]))


def choose_tile(tokens: int) -> Tile:
    """A tile for so many tokens, near the best of four to seven on an H200.

    22016 x 4096 takes 26 µs with up to 16 tokens, 27 with 64; with 2048, 1184 TOP/s.
    """
    if tokens <= 16:
        return Tile(64, 16, 256, 4, 4)
    if tokens <= 64:
        return Tile(64, 64, 128, 4, 4)
    return Tile(128, 128, 128, 8, 3)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] as int8 [T, K] and float32 scales [T]: its largest absolute element is 127."""
    x = x if x.stride(1) == 1 else x.contiguous()
    tokens, columns = x.shape
    quantized = torch.empty(tokens, columns, dtype=torch.int8, device=x.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    block = next_power_of_2(columns)
    pdl = supports_pdl(x)
    launch(
        _quantize_kernel,
        (tokens,),
        x,
        quantized,
        scales,
        x.stride(0),
        COLUMNS=columns,
        BLOCK=block,
        PDL=pdl,
        num_warps=min(16, max(4, block // 512)),
        **launch_options(pdl),
    )
    return quantized, scales


def int8_matmul(
    x: Tensor,
    x_scales: Tensor,
    weight: W8Weight,
    bias: Tensor | None,
    dtype: torch.dtype,
    tile: Tile,
) -> Tensor:
    """x int8 [T, K] times the weight, by programs of one tile each: [T, N] of `dtype`."""
    tokens, columns = x.shape
    rows = weight.qweight.shape[0]
    out = torch.empty(tokens, rows, dtype=dtype, device=x.device)
    pdl = supports_pdl(x)
    grid = (cdiv(tokens, tile.tokens), cdiv(rows, tile.rows))
    launch(
        _int8_matmul_kernel,
        grid,
        x,
        x_scales,
        weight.qweight,
        weight.scales,
        x_scales if bias is None else bias,
        out,
        tokens,
        rows,
        columns,
        weight.qweight.stride(0),
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
