"""Layouts of quantized weights: what goes in comes out, and lies where the kernels look for it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from kernels.packing import (
    dequantize_w4,
    pack_awq,
    pack_w4,
    unpack_awq,
    unpack_w4,
)


def drawn(rows: int, columns: int, group_size: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    groups = (rows, columns // group_size)
    return (
        torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8),
        torch.rand(groups, generator=generator).to(torch.float16),
        torch.randint(0, 16, groups, generator=generator, dtype=torch.uint8),
    )


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 140),
    groups=st.integers(1, 9),
    group_size=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 99),
)
def test_w4_round_trip(rows, groups, group_size, seed):
    q, scales, zeros = drawn(rows, groups * group_size, group_size, seed)
    weight = pack_w4(q, scales, zeros, group_size)
    assert weight.qweight.shape[:2] == (-(-rows // 64), -(-groups * group_size // 128))
    for given_, found in zip((q, scales, zeros), unpack_w4(weight)):
        assert torch.equal(given_, found)
    wide = q.float().view(rows, groups, group_size)
    expected = (wide - zeros.float()[..., None]) * scales.float()[..., None]
    assert torch.equal(dequantize_w4(weight), expected.flatten(1))


def test_w4_puts_a_lanes_columns_side_by_side():
    # One column at a time: which word and nibble of the tile's row hold it?
    for column in (0, 1, 2, 8, 16, 32, 127):
        q = torch.zeros(64, 128, dtype=torch.uint8)
        q[5, column] = 15
        ones = torch.ones(64, 1)
        weight = pack_w4(q, ones, torch.zeros(64, 1, dtype=torch.uint8), 128)
        u, s, h = column // 32, column // 16 % 2, column // 8 % 2
        c, p = column // 2 % 4, column % 2
        word = int(weight.qweight[0, 0, 5, 4 * c + u]) & 0xFFFFFFFF
        assert word == 15 << (4 * (2 * s + h + 4 * p))
        assert int((weight.qweight != 0).sum()) == 1


def test_w4_padding_is_worth_nothing():
    q, scales, zeros = drawn(3, 96, 32, 0)
    weight = pack_w4(q, scales, zeros, 32)
    weight.out_features, weight.in_features = 64, 128
    whole = dequantize_w4(weight)
    assert whole[3:].abs().max() == 0 and whole[:, 96:].abs().max() == 0


@pytest.mark.parametrize(("columns", "group_size"), [(128, 16), (100, 32), (128, 256)])
def test_w4_groups_that_do_not_fit_are_said(columns, group_size):
    q = torch.zeros(2, columns, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"{columns} columns in groups of {group_size}"):
        pack_w4(q, torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.uint8), group_size)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 9), eighths=st.integers(1, 9), seed=st.integers(0, 99))
def test_awq_round_trip(rows, eighths, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (rows, 8 * eighths), generator=generator, dtype=torch.uint8)
    assert torch.equal(unpack_awq(pack_awq(q)), q)


def test_awq_order_is_the_checkpoints():
    # AutoAWQ's "gemm" files: nibbles 0, 1, 2 ... of a word hold columns 0, 2, 4, 6, 1, 3, 5, 7.
    assert int(pack_awq(torch.arange(8, dtype=torch.uint8)[None])) == 0x75316420
    with pytest.raises(ValueError, match="multiple of 8"):
        pack_awq(torch.zeros(1, 12, dtype=torch.uint8))
