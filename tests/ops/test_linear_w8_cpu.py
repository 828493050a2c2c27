"""W8A8 on a CPU: the reference's bits, whether or not the weight was reordered."""

from __future__ import annotations

import importlib

import pytest
import torch

import kernels.reference
from kernels import ops
from kernels.cpu import linear_w8 as op_of_the_package
from kernels.cpu.linear_w8 import linear_w8, reorder
from kernels.packing import W8Weight

module = importlib.import_module("kernels.cpu.linear_w8")

# Rows, inputs, outputs: single ones, odd ones, more than a cache line, a sum beyond 2**24.
SHAPES = [(1, 64, 48), (3, 100, 7), (17, 512, 96), (2, 4096, 33), (5, 1, 1)]


def made(inputs: int, outputs: int, seed: int = 0) -> W8Weight:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
    return W8Weight(q, torch.rand(outputs, generator=generator) * 0.01 + 1e-4)


def tokens(rows: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_the_op_is_found():
    assert ops.implementation("linear_w8", "cpu") is linear_w8 is op_of_the_package


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_references_bits(shape, biased, dtype):
    rows, inputs, outputs = shape
    weight, x = made(inputs, outputs), tokens(rows, inputs, dtype)
    bias = tokens(1, outputs, dtype)[0] if biased else None
    expected = kernels.reference.linear_w8(x, weight, bias)
    for stored in (weight, reorder(weight)):
        found = linear_w8(x, stored, bias)
        assert found.dtype == dtype and torch.equal(found, expected)


def test_largest_numbers():
    """All products 127 * 127: sums that neither 16 bits nor a float32's mantissa hold."""
    weight = W8Weight(torch.full((16, 2048), 127, dtype=torch.int8), torch.full((16,), 0.5))
    weight.qweight[::2] = -127
    x = torch.full((4, 2048), -3.0)
    expected = kernels.reference.linear_w8(x, weight, None)
    for stored in (weight, reorder(weight)):
        assert torch.equal(linear_w8(x, stored, None), expected)


def test_a_row_does_not_depend_on_the_others():
    weight, x = reorder(made(256, 80)), tokens(9, 256, torch.bfloat16)
    together = linear_w8(x, weight, None)
    for row in range(9):
        assert torch.equal(linear_w8(x[row : row + 1], weight, None, True)[0], together[row])


@pytest.mark.parametrize("zero_point", [0, 128], ids=["amx", "vnni"])
def test_the_bits_do_not_depend_on_how_tokens_are_given_to_onednn(monkeypatch, zero_point):
    monkeypatch.setattr(module, "_zero_point", lambda: zero_point)
    weight, x = made(2048, 40), tokens(3, 2048, torch.float32)
    x[1] = -3.0  # all of them -127
    weight.qweight[::2] = -127
    expected = kernels.reference.linear_w8(x, weight, None)
    assert torch.equal(linear_w8(x, reorder(weight), None), expected)


@pytest.mark.parametrize("has_amx", [False, True])
def test_signed_tokens_are_for_amx_only(monkeypatch, has_amx):
    """Without AMX, oneDNN multiplies int8 by int8 in its reference: a second a row."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_int8": has_amx})
    assert module._zero_point.__wrapped__() == (0 if has_amx else 128)


def test_a_token_of_zeros():
    weight, x = reorder(made(64, 8)), torch.zeros(2, 64)
    assert torch.equal(linear_w8(x, weight, None), torch.zeros(2, 8))


def test_without_instructions_for_int8_the_weight_stays(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    weight = made(64, 8)
    assert reorder(weight) is weight


def test_inputs_that_are_no_run_of_memory():
    weight = made(64, 8)
    x = tokens(64, 12, torch.float32).t()
    expected = kernels.reference.linear_w8(x, weight, None)
    for stored in (weight, reorder(weight)):
        assert torch.equal(linear_w8(x, stored, None), expected)
