"""Round to nearest in groups, and its way through AutoAWQ's layout: properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from backend.errors import UserError
from kernels.packing import pack_awq, unpack_awq
from quantize.rtn import GroupFormat, group_parameters, quantize
from tests.quantization.second_reader import nibbles_of

FORMS = st.builds(
    GroupFormat,
    bits=st.sampled_from((3, 4, 8)),
    group_size=st.sampled_from((32, 64, 128)),
    symmetric=st.booleans(),
)


def matrix(seed: int, rows: int, columns: int, scale: float = 0.05, shift: float = 0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * scale + shift


@settings(max_examples=60, deadline=None)
@given(
    form=FORMS,
    seed=st.integers(0, 2**31),
    scale=st.sampled_from((1e-3, 0.05, 3.0)),
    shift=st.sampled_from((0.0, 0.02, -1.0, 5.0)),
)
def test_no_element_is_more_than_half_a_step_off(form, seed, scale, shift):
    weight = matrix(seed, 5, 256, scale, shift)
    quantized = quantize(weight, form)
    error = (quantized.dequantize() - weight).abs().unflatten(1, (-1, form.group_size))
    # The scale is a float16, rounded by 2**-11 of itself or 2**-25: at the range's ends that much
    # of each level may be missing.
    steps = 0.5 + form.levels * 2.0**-11
    slack = form.levels * 2.0**-25 + 1e-6 * weight.abs().max()
    assert bool((error <= steps * quantized.scales.float().unsqueeze(-1) + slack).all())
    assert int(quantized.q.max()) <= form.levels and int(quantized.zeros.max()) <= form.levels
    if form.symmetric:
        assert bool((quantized.zeros == 2 ** (form.bits - 1)).all())


@settings(max_examples=40, deadline=None)
@given(form=FORMS, seed=st.integers(0, 2**31))
def test_rounding_what_was_rounded_changes_nothing(form, seed):
    once = quantize(matrix(seed, 4, 128), form)
    scales, zeros = once.scales, once.zeros
    again = quantize(once.dequantize(), form)
    # A group may use fewer levels than it has; where it uses them all, nothing moves.
    low, high = once.q.unflatten(1, (-1, form.group_size)).aminmax(dim=-1)
    full = (low == 0) & (high == form.levels)
    torch.testing.assert_close(again.scales[full], scales[full])
    assert torch.equal(again.zeros[full], zeros[full])


def test_zeros_and_zero_columns_stay_exactly_zero():
    for symmetric in (False, True):
        weight = matrix(0, 4, 64, shift=2.0)
        weight[:, ::5] = 0
        weight[2] = 0
        back = quantize(weight, GroupFormat(4, 32, symmetric)).dequantize()
        assert bool((back[weight == 0] == 0).all())
        assert bool(torch.isfinite(back).all())


def test_shrink_clips():
    weight = matrix(1, 3, 64)
    full, _ = group_parameters(weight, GroupFormat(4, 32))
    half, _ = group_parameters(weight, GroupFormat(4, 32), 0.5)
    torch.testing.assert_close(half.float(), full.float() / 2, rtol=1e-3, atol=1e-6)
    kept = quantize(weight, GroupFormat(4, 32), 0.5).dequantize()
    assert float(kept.max()) < float(weight.max())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 9), words=st.integers(1, 6))
def test_awq_layout_there_and_back(seed, rows, words):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (rows, 8 * words), dtype=torch.uint8, generator=generator)
    packed = pack_awq(q)
    assert packed.dtype == torch.int32 and packed.shape == (rows, words)
    assert torch.equal(unpack_awq(packed), q)
    assert torch.equal(torch.from_numpy(nibbles_of(packed.numpy())), q)


def test_refusals():
    with pytest.raises(UserError, match="5 bits"):
        GroupFormat(bits=5)
    with pytest.raises(UserError, match="group size 100"):
        GroupFormat(group_size=100)
    with pytest.raises(UserError, match="96 inputs, which the group size 64"):
        quantize(torch.zeros(2, 96), GroupFormat(group_size=64))
    with pytest.raises(ValueError, match="float16"):
        quantize(torch.full((2, 32), 1e8), GroupFormat(group_size=32))
    with pytest.raises(ValueError, match="float16"):
        quantize(torch.full((2, 32), float("nan")), GroupFormat(group_size=32))
