"""Norms and the gate in Triton against the reference: on the GPU, or interpreted."""

from __future__ import annotations

import pytest
import torch

import kernels.reference
from tests.ops.gpu_device import DEVICE

from kernels.gpu import elementwise  # isort: skip  (gpu_device decides how Triton is imported)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# One row, rows that share a program (64) with a ragged end, heads, widths off any power of two.
SHAPES = [(64,), (1, 64), (19, 96), (3, 4, 32), (2, 2, 3, 16), (2, 1200)]


def drawn(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[actual.dtype], rtol=1e-2)


def same_sum(actual, expected):
    """Rounded once, as torch does; but the interpreter cuts bfloat16 off instead of rounding."""
    if DEVICE.type == "cpu" and actual.dtype is torch.bfloat16:
        close(actual, expected)
    else:
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms(dtype, shape):
    x, residual, weight = drawn(shape, dtype), drawn(shape, dtype, 1), drawn(shape[-1:], dtype, 2)
    close(elementwise.rms_norm(x, weight, 1e-5), kernels.reference.rms_norm(x, weight, 1e-5))
    normed, total = kernels.reference.add_rms_norm(x, residual, weight, 1e-5)
    actual, actual_total = elementwise.add_rms_norm(x, residual, weight, 1e-5)
    close(actual, normed)
    same_sum(actual_total, total)
    assert actual_total.data_ptr() == residual.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_rows_wider_than_a_program(dtype, monkeypatch):
    monkeypatch.setattr(elementwise, "MAX_BLOCK", 64)
    x, residual, weight = drawn((3, 200), dtype), drawn((3, 200), dtype, 1), drawn((200,), dtype, 2)
    close(elementwise.rms_norm(x, weight, 1e-5), kernels.reference.rms_norm(x, weight, 1e-5))
    normed, total = kernels.reference.add_rms_norm(x, residual, weight, 1e-5)
    actual, actual_total = elementwise.add_rms_norm(x, residual, weight, 1e-5)
    close(actual, normed)
    same_sum(actual_total, total)


def test_norms_of_views_leave_the_rest_alone():
    # As Qwen3's query norm finds its heads: a slice of one fused product.
    fused = drawn((5, 8, 32), torch.float16)
    before = fused.clone()
    q, weight = fused[:, :4], drawn((32,), torch.float16, 1)
    close(elementwise.rms_norm(q, weight, 1e-6), kernels.reference.rms_norm(q, weight, 1e-6))
    assert torch.equal(fused, before)
    x, residual = drawn((5, 4, 32), torch.float16, 2), fused[:, 2:6]
    normed, total = kernels.reference.add_rms_norm(x, residual, weight, 1e-6)
    actual, actual_total = elementwise.add_rms_norm(x, residual, weight, 1e-6)
    close(actual, normed)
    same_sum(actual_total, total)
    assert torch.equal(fused[:, :2], before[:, :2]) and torch.equal(fused[:, 6:], before[:, 6:])


def test_a_norm_of_columns_that_lie_apart():
    x, weight = drawn((48, 6), torch.float32).t(), drawn((48,), torch.float32, 1)
    close(elementwise.rms_norm(x, weight, 1e-6), kernels.reference.rms_norm(x, weight, 1e-6))


def test_norms_of_large_half_precision_values_do_not_overflow():
    x = torch.full((1, 64), 60000.0, dtype=torch.float16, device=DEVICE)
    weight = torch.ones(64, dtype=torch.float16, device=DEVICE)
    torch.testing.assert_close(elementwise.rms_norm(x, weight, 1e-6), torch.ones_like(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48,), (6, 48), (2, 3, 2 * 1030)])
def test_gate(dtype, shape):
    x = drawn(shape, dtype)
    close(elementwise.silu_and_mul(x), kernels.reference.silu_and_mul(x))


def test_gate_of_a_view_and_of_large_values():
    x = drawn((4, 200), torch.float32)[:, 40:160]
    close(elementwise.silu_and_mul(x), kernels.reference.silu_and_mul(x))
    gate = torch.tensor([[-1000.0, 1000.0, 2.0, 2.0]], device=DEVICE)
    expected = torch.tensor([[0.0, 2000.0]], device=DEVICE)
    torch.testing.assert_close(elementwise.silu_and_mul(gate), expected)


def test_no_rows():
    empty = torch.empty(0, 64, device=DEVICE)
    weight = torch.ones(64, device=DEVICE)
    assert elementwise.rms_norm(empty, weight, 1e-6).shape == (0, 64)
    assert elementwise.silu_and_mul(empty).shape == (0, 32)


def test_shapes_that_do_not_fit_are_refused():
    x = drawn((2, 8), torch.float32)
    with pytest.raises(ValueError, match="weight"):
        elementwise.rms_norm(x, drawn((4,), torch.float32), 1e-6)
    with pytest.raises(ValueError, match="add_rms_norm"):
        elementwise.add_rms_norm(x, drawn((2, 4), torch.float32), drawn((8,), torch.float32), 1e-6)
    with pytest.raises(ValueError, match="odd"):
        elementwise.silu_and_mul(drawn((2, 7), torch.float32))
