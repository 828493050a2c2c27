"""4-bit products on a CPU against the reference: few rows, many rows, every size and group."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st

import kernels.reference
from kernels import ops
from kernels.packing import W4Weight, pack_w4

# The module; the package's attribute of this name is the op.
w4 = importlib.import_module("kernels.cpu.linear_w4")

MANY = w4.UNPACKED_MIN_ROWS


def drawn(outputs: int, inputs: int, group_size: int, seed: int = 0):
    """The same weight as the CPU's op takes it and as the reference does.

    Scales have 8 significant bits: what rounding a checkpoint's costs is tested on a model.
    """
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (outputs, inputs), generator=generator, dtype=torch.uint8)
    shape = (outputs, inputs // group_size)
    zeros = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    scales = (torch.rand(shape, generator=generator) * 0.01 + 0.001).bfloat16().float()
    parts = (q, scales, zeros, group_size)
    return w4.pack(*parts), pack_w4(*parts)


def tokens(rows: int, inputs: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, inputs, generator=generator).bfloat16()


def check(found: torch.Tensor, x: torch.Tensor, exact: W4Weight, bias=None) -> None:
    """Half of the output's last bit, and of the weights' and zeros' where they are rounded.

    Those add up as the products' own sizes do, which are larger than sums that happen to cancel.
    """
    expected = kernels.reference.linear_w4(x.float(), exact, bias)
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape
    assert found.is_contiguous()
    weight = kernels.reference.linear_w4(torch.eye(x.shape[1]), exact, None)
    products = float((x.float().square() @ weight.square()).max()) ** 0.5
    size = max(float(expected.abs().max()), products)
    torch.testing.assert_close(found.float(), expected, atol=size * 2**-7, rtol=0)


def test_the_ops_are_found():
    assert ops.implementation("linear_w4", "cpu") is w4.linear_w4
    assert ops.implementation("gated_linear_w4", "cpu") is w4.gated_linear_w4


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 200), st.integers(1, 5), st.sampled_from([32, 64, 128]),
    st.one_of(st.integers(1, 9), st.integers(MANY - 1, MANY + 9)), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_the_references_product(outputs, groups, group_size, rows, biased, seed):
    packed, exact = drawn(outputs, groups * group_size, group_size, seed)
    x = tokens(rows, groups * group_size, seed)
    bias = tokens(1, outputs)[0] if biased else None
    check(ops.linear_w4(x, packed, bias), x, exact, bias)


@pytest.mark.parametrize("rows", [1, MANY])
def test_each_weight_is_at_its_place(rows):
    """Tokens of a single one: the product is the weights themselves."""
    packed, exact = drawn(130, 128, 32)
    parts = torch.eye(128).bfloat16().split(rows)
    found = torch.cat([ops.linear_w4(x, packed, None) for x in parts])
    plain = kernels.reference.linear_w4(torch.eye(128), exact, None)
    torch.testing.assert_close(found.float(), plain, atol=3e-4, rtol=2**-7)


def test_several_tiles(monkeypatch):
    monkeypatch.setattr(w4, "TILE_WEIGHTS", 128 * 130)  # two blocks at a time
    packed, exact = drawn(330, 128, 64)
    x = tokens(MANY, 128)
    check(ops.linear_w4(x, packed, None), x, exact)


@pytest.mark.parametrize("rows", [1, MANY])
def test_gate_and_up(rows):
    packed, exact = drawn(2 * 72, 64, 32)
    x = tokens(rows, 64)
    found = ops.gated_linear_w4(x, packed)
    expected = kernels.reference.gated_linear_w4(x.float(), exact)
    torch.testing.assert_close(found.float(), expected, atol=1e-2, rtol=2e-2)


def test_a_row_does_not_depend_on_the_others_when_it_must_not():
    packed, _ = drawn(80, 256, 64)
    x = tokens(2 * MANY, 256)
    together = ops.linear_w4(x, packed, None, True)
    for row in (0, 1, 5, MANY, 2 * MANY - 1):
        assert torch.equal(ops.linear_w4(x[row : row + 1], packed, None, True)[0], together[row])


def test_inputs_that_are_no_run_of_memory():
    packed, exact = drawn(40, 64, 32)
    for rows in (3, MANY):
        x = tokens(64, rows).t()
        check(ops.linear_w4(x, packed, None), x, exact)


def test_a_weight_in_the_other_devices_layout():
    _, exact = drawn(40, 64, 32)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
    found = ops.linear_w4(x, exact, None)
    assert torch.equal(found, kernels.reference.linear_w4(x, exact, None))


def test_an_order_that_is_not_known_is_never_unpacked(monkeypatch):
    monkeypatch.setattr(w4, "_block_outputs", lambda: 0)
    monkeypatch.setattr(w4, "_by_tiles", None)
    packed, exact = drawn(40, 64, 32)
    x = tokens(MANY, 64)
    check(ops.linear_w4(x, packed, None), x, exact)


@pytest.mark.parametrize("instructions", ["avx2", "default"])
def test_other_instructions_have_another_order(instructions):
    """torch chooses them once a process; the same tests, in one that has fewer."""
    chosen = "at_its_place or several_tiles"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", chosen, "-p", "no:cacheprovider"]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": instructions}
    ran = subprocess.run(
        [*command, __file__], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stdout[-3000:]
