"""Norms and the gated activation: bound by launch latency at one token, by memory at many."""

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

# Widest row that one program holds in registers: 16 warps, 32 elements a thread.
MAX_BLOCK = 16384
# Elements of a program of several short rows (the norms of Qwen3's heads).
ROWS_BLOCK = 1024
# Elements of a gate: 16 bytes a thread from each half.
GATE_BLOCK = 1024


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    rows,
    heads,  # rows of one outer index: row r lies at (r // heads, r % heads)
    x_outer,
    x_inner,
    residual_outer,
    residual_inner,
    eps,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    """ROWS whole rows, held in registers between the sum of squares and the product."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < HIDDEN)[None, :]
    # No kernel changes the weight: it is fetched while the kernel before this one still runs.
    w = tl.load(weight + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
    wait_for_predecessor(PDL)
    release_successor(PDL)
    outer, inner = row // heads, row % heads
    values = tl.load(
        x + (outer * x_outer + inner * x_inner)[:, None] + column[None, :], mask=mask, other=0.0
    )
    if ADD:
        place = residual + (outer * residual_outer + inner * residual_inner)[:, None]
        values = _rounded_sum(values, tl.load(place + column[None, :], mask=mask, other=0.0))
        tl.store(place + column[None, :], values, mask=mask)
    values = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=1) / HIDDEN + eps)
    result = values * scale[:, None] * w[None, :]
    tl.store(
        out + row[:, None] * HIDDEN + column[None, :], result.to(out.dtype.element_ty), mask=mask
    )


@triton.jit(do_not_specialize=["rows"])
def _wide_rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    rows,
    heads,
    x_outer,
    x_inner,
    residual_outer,
    residual_inner,
    eps,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row wider than registers hold, read twice; the arguments are `_rms_norm_kernel`'s."""
    row = tl.program_id(0).to(tl.int64) * ROWS
    column = tl.arange(0, BLOCK)
    wait_for_predecessor(PDL)
    release_successor(PDL)
    source = x + (row // heads) * x_outer + (row % heads) * x_inner
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    if ADD:
        total = residual + (row // heads) * residual_outer + (row % heads) * residual_inner
        for start in range(0, HIDDEN, BLOCK):
            mask = start + column < HIDDEN
            first = tl.load(source + start + column, mask=mask, other=0.0)
            second = tl.load(total + start + column, mask=mask, other=0.0)
            values = _rounded_sum(first, second)
            tl.store(total + start + column, values, mask=mask)
            squares += values.to(tl.float32) * values.to(tl.float32)
        source = total
        tl.debug_barrier()  # other threads may read what this one wrote
    else:
        for start in range(0, HIDDEN, BLOCK):
            mask = start + column < HIDDEN
            values = tl.load(source + start + column, mask=mask, other=0.0).to(tl.float32)
            squares += values * values
    scale = tl.rsqrt(tl.sum(squares, axis=0) / HIDDEN + eps)
    for start in range(0, HIDDEN, BLOCK):
        mask = start + column < HIDDEN
        values = tl.load(source + start + column, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight + start + column, mask=mask, other=0.0).to(tl.float32)
        result = (values * scale * w).to(out.dtype.element_ty)
        tl.store(out + row * HIDDEN + start + column, result, mask=mask)


@triton.jit
def _rounded_sum(first, second):
    """The sum in float32, rounded once to the operands' type, as torch adds."""
    return (first.to(tl.float32) + second.to(tl.float32)).to(first.dtype)


@triton.jit
def _silu_and_mul_kernel(
    x, out, x_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    wait_for_predecessor(PDL)
    release_successor(PDL)
    gate = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * WIDTH + column, result.to(out.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `kernels.ops.rms_norm`. A view of up to three dimensions is read where it lies."""
    return _norm(x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.add_rms_norm`. The sum is written over `residual`.

    Raises:
        ValueError: x and residual differ in shape or dtype.
    """
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"add_rms_norm of {x.dtype} {list(x.shape)} and {residual.dtype} {list(residual.shape)}"
        )
    residual = _readable(residual)
    return _norm(x, residual, weight, eps), residual.view(x.shape)


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    hidden = x.shape[-1]
    if weight.shape != (hidden,):
        raise ValueError(f"a norm's weight {list(weight.shape)} for rows of {hidden}")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = _readable(x)
    heads, x_outer, x_inner = _row_strides(x)
    _, residual_outer, residual_inner = (
        (heads, 0, 0) if residual is None else _row_strides(residual)
    )
    block = min(next_power_of_2(hidden), MAX_BLOCK)
    wide = hidden > MAX_BLOCK
    rows_a_program = 1 if wide else max(1, ROWS_BLOCK // block)
    rows = out.numel() // hidden
    pdl = supports_pdl(x)
    kernel = _wide_rms_norm_kernel if wide else _rms_norm_kernel
    launch(
        kernel,
        (cdiv(rows, rows_a_program),),
        x,
        x if residual is None else residual,
        weight,
        out,
        rows,
        heads,
        x_outer,
        x_inner,
        residual_outer,
        residual_inner,
        eps,
        HIDDEN=hidden,
        ROWS=rows_a_program,
        BLOCK=block,
        ADD=residual is not None,
        PDL=pdl,
        num_warps=min(16, max(4, block // 512)),
        **launch_options(pdl),
    )
    return out


def _readable(x: Tensor) -> Tensor:
    """x as at most three dimensions of which the last is contiguous; a copy only where needed."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.reshape(-1, x.shape[-1]) if x.dim() > 3 else x


def _row_strides(x: Tensor) -> tuple[int, int, int]:
    """Rows of one outer index, then the strides of the outer and the inner index."""
    if x.dim() == 3:
        return max(1, x.shape[1]), x.stride(0), x.stride(1)
    return 1, x.stride(0) if x.dim() == 2 else 0, 0


def silu_and_mul(x: Tensor) -> Tensor:
    """See `kernels.ops.silu_and_mul`.

    Raises:
        ValueError: the last dimension is odd.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"silu_and_mul of rows of {x.shape[-1]}, which is odd")
    width = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    rows = x.reshape(-1, 2 * width)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    pdl = supports_pdl(x)
    launch(
        _silu_and_mul_kernel,
        (rows.shape[0], cdiv(width, GATE_BLOCK)),
        rows,
        out,
        rows.stride(0),
        WIDTH=width,
        BLOCK=GATE_BLOCK,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    return out
