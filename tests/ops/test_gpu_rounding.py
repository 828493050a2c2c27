"""GPTQ's inner loop in Triton against the reference: on the GPU, or interpreted."""

from __future__ import annotations

import pytest
import torch

import kernels.reference
from tests.ops.gpu_device import DEVICE, ON_GPU

from kernels.gpu import rounding  # isort: skip  (gpu_device decides how Triton is imported)


def case(columns: int, outputs: int, groups: int, levels: int, seed: int = 0):
    """A weight in rows of a larger matrix, a factor as of correlated inputs, parameters."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(columns + 7, outputs, generator=generator) * 0.05
    factor = torch.eye(columns) + torch.randn(columns, columns, generator=generator).triu(1) * 0.1
    steps = 0.2 * (1 + torch.rand(groups, outputs, generator=generator)) / levels
    zeros = torch.randint(0, levels + 1, (groups, outputs), generator=generator).float()
    weight = whole.to(DEVICE)[7:]
    return weight, factor.t().contiguous().t().to(DEVICE), steps.to(DEVICE), zeros.to(DEVICE)


SHAPES = [(32, 9, 1), (96, 5, 3), (64, 8, 2), (128, 11, 1), (128, 3, 4)]


@pytest.mark.parametrize(
    ("columns", "outputs", "groups"), SHAPES + ([(128, 22016, 1)] if ON_GPU else [])
)
@pytest.mark.parametrize("levels", [15, 255])
def test_rounding_like_the_reference(columns, outputs, groups, levels):
    weight, factor, scales, zeros = case(columns, outputs, groups, levels)
    before = weight.clone()
    q, errors = rounding.round_columns(weight, factor, scales, zeros, levels)
    assert torch.equal(weight, before)
    wanted_q, wanted = kernels.reference.round_columns(weight, factor, scales, zeros, levels)
    # A GPU multiplies and adds in one step: now and then a number between two levels goes to the
    # other one, and then so may those after it.
    same = (q == wanted_q).all(0)
    assert float(same.float().mean()) > (0.98 if ON_GPU else 0.999)
    torch.testing.assert_close(errors[:, same], wanted[:, same], rtol=1e-3, atol=1e-5)


def test_weights_far_out_of_range_are_cut_off():
    weight, factor, scales, zeros = case(32, 8, 1, 15)
    weight[3, 2], weight[5, 4] = 1e30, -1e30
    q, errors = rounding.round_columns(weight, torch.eye(32, device=DEVICE), scales, zeros, 15)
    assert int(q[3, 2]) == 15 and int(q[5, 4]) == 0
    assert float(errors[3, 2]) == pytest.approx(1e30) and bool(torch.isfinite(errors).all())
