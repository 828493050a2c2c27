"""GPTQ's inner loop: columns rounded one after another, each making up for those before it.

A program has all columns of a few outputs in its registers, so that the loop, whose steps wait for
one another, reads and writes nothing but its results. In PyTorch each step is a dozen launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.linear_w8 import ROUNDER

OUTPUTS = 8  # of a program, which is one warp: 128 columns of them are 32 registers a thread
# Steps further from 0 are cut off anyway, and ROUNDER holds for them.
FARTHEST = tl.constexpr(1024.0)


@triton.jit
def _round_columns_kernel(
    weight,
    factor,
    scales,
    zeros,
    q,
    errors,
    outputs,
    weight_stride,
    factor_stride,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    output = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = output < outputs
    row = tl.arange(0, PADDED)
    there = (row < COLUMNS)[:, None] & mask[None, :]
    left = tl.load(weight + row[:, None] * weight_stride + output[None, :], mask=there, other=0.0)
    for column in range(COLUMNS):
        value = tl.sum(tl.where((row == column)[:, None], left, 0.0), axis=0)
        group = (column // GROUP) * outputs + output
        scale = tl.load(scales + group, mask=mask, other=1.0)
        zero = tl.load(zeros + group, mask=mask, other=0.0)
        steps = tl.div_rn(value, scale)
        steps = tl.minimum(tl.maximum(steps, -FARTHEST), FARTHEST)
        level = (steps + ROUNDER) - ROUNDER + zero
        level = tl.minimum(tl.maximum(level, 0.0), LEVELS)
        own = tl.load(factor + column * factor_stride + column)
        error = tl.div_rn(value - (level - zero) * scale, own + tl.zeros_like(value))
        later = (row > column) & (row < COLUMNS)
        share = tl.load(factor + column * factor_stride + row, mask=later, other=0.0)
        left -= share[:, None] * error[None, :]
        tl.store(q + column * outputs + output, level.to(tl.uint8), mask=mask)
        tl.store(errors + column * outputs + output, error, mask=mask)


def round_columns(
    weight: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.round_columns`. Up to 128 columns."""
    columns, outputs = weight.shape
    factor, scales, zeros = factor.contiguous(), scales.contiguous(), zeros.contiguous()
    q = torch.empty(columns, outputs, dtype=torch.uint8, device=weight.device)
    errors = torch.empty(columns, outputs, dtype=torch.float32, device=weight.device)
    _round_columns_kernel[(triton.cdiv(outputs, OUTPUTS),)](
        weight,
        factor,
        scales,
        zeros,
        q,
        errors,
        outputs,
        weight.stride(0),
        factor.stride(0),
        COLUMNS=columns,
        PADDED=triton.next_power_of_2(columns),
        GROUP=columns // scales.shape[0],
        LEVELS=levels,
        BLOCK=OUTPUTS,
        num_warps=1,
    )
    return q, errors
