"""GPTQ's rounding (Frantar et al. 2022): what a column lost by rounding, later columns make up for.

Scales and zero points are given (the search of `quantize.awq` found them); only which neighbour an
element is rounded to changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.rtn import GroupFormat, GroupQuantized

DAMPING = 0.01  # of H's mean diagonal, added to it: GPTQ's
COLUMNS = 128  # handled together before the rest of the matrix hears of their errors


def round_compensated(
    weight: Tensor, gram: Tensor, tokens: int, nearest: GroupQuantized, form: GroupFormat
) -> GroupQuantized:
    """weight float32 [N, K] in the groups of `nearest`; gram float32 [K, K] = mean(x xᵀ).

    A row that would come out with a larger error than `nearest`'s keeps that.

    Args:
        tokens: that gram is a mean of. What K / (K + tokens) of it says of two channels together
            is held for chance: errors would be moved to where they harm other text. (The bundled
            model, 2048 tokens: KL to the original on held-out text 0.0320, without this 0.0404,
            without compensation 0.0412.)
    """
    columns = weight.shape[1]
    damped = gram * (tokens / (columns + tokens))
    own = gram.diagonal()
    damped.diagonal().copy_(own + DAMPING * own.mean() + 1e-12)
    # Upper triangular with factorᵀ factor = the inverse: from the last column to the first, a
    # Cholesky factor of the matrix itself, so that it is inverted only once.
    flipped = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    identity = torch.eye(columns, device=weight.device)
    factor = torch.linalg.solve_triangular(flipped, identity, upper=True)
    # Columns as rows from here on, so that one lies in one piece of memory.
    left = weight.t().contiguous()
    q = torch.empty_like(left, dtype=torch.uint8)
    scales, zeros = nearest.scales.float().t().contiguous(), nearest.zeros.float().t().contiguous()
    for start in range(0, columns, COLUMNS):
        stop = min(start + COLUMNS, columns)
        errors = torch.empty_like(left[start:stop])
        for column in range(start, stop):
            group = column // form.group_size
            scale, zero = scales[group], zeros[group]
            level = ((left[column] / scale).round_() + zero).clamp_(0, form.levels)
            q[column] = level
            error = (left[column] - (level - zero) * scale) / factor[column, column]
            left[column:stop] -= factor[column, column:stop, None] * error
            errors[column - start] = error
        left[stop:] -= factor[start:stop, stop:].t() @ errors
    compensated = GroupQuantized(q.t().contiguous(), nearest.scales, nearest.zeros)
    keep = _loss(compensated, weight, gram) >= _loss(nearest, weight, gram)
    q = torch.where(keep[:, None], nearest.q, compensated.q)
    return GroupQuantized(q, nearest.scales, nearest.zeros)


def _loss(quantized: GroupQuantized, weight: Tensor, gram: Tensor) -> Tensor:
    error = quantized.dequantize() - weight
    return ((error @ gram) * error).sum(1)
