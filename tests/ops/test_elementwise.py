"""The CPU's own norms, rotation, gate and KV store against the reference, and that against sums."""

from __future__ import annotations

import pytest
import torch

import kernels.cpu
import kernels.reference
from kernels.ops import KVCache

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def drawn(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[actual.dtype], rtol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (7, 96), (3, 4, 32)])
def test_norms(dtype, shape):
    x, residual, weight = drawn(shape, dtype), drawn(shape, dtype, 1), drawn(shape[-1:], dtype, 2)
    close(
        kernels.cpu.rms_norm(x, weight, 1e-5), kernels.reference.rms_norm(x, weight, 1e-5)
    )
    for actual, expected in zip(
        kernels.cpu.add_rms_norm(x, residual, weight, 1e-5),
        kernels.reference.add_rms_norm(x, residual, weight, 1e-5),
        strict=True,
    ):
        close(actual, expected)


def test_norm_of_a_known_vector():
    x = torch.tensor([[3.0, 4.0]])
    expected = x / 12.5**0.5 * torch.tensor([2.0, 1.0])
    torch.testing.assert_close(
        kernels.reference.rms_norm(x, torch.tensor([2.0, 1.0]), 0.0), expected
    )


def test_norm_of_large_half_precision_values_does_not_overflow():
    x = torch.full((1, 64), 60000.0, dtype=torch.float16)
    weight = torch.ones(64, dtype=torch.float16)
    for module in (kernels.cpu, kernels.reference):
        torch.testing.assert_close(module.rms_norm(x, weight, 1e-6), torch.ones_like(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [32, 8])
def test_rotation(dtype, rotary_dim):
    # As in the decoder, q and k are views of one fused product.
    qkv = drawn((5, 8, 32), dtype)
    q, k, _ = qkv.split((4, 2, 2), dim=1)
    before = qkv.clone()
    angles = drawn((5, rotary_dim // 2), torch.float32, 3).repeat(1, 2)
    arguments = (q, k, angles.cos(), angles.sin())
    for actual, expected in zip(
        kernels.cpu.rotary_embedding(*arguments),
        kernels.reference.rotary_embedding(*arguments),
        strict=True,
    ):
        close(actual, expected)
    assert torch.equal(qkv, before)


def test_rotation_is_one_of_the_plane_of_paired_halves():
    x = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]])  # pairs (1, 0) and (0, 2)
    angles = torch.tensor([[torch.pi / 2, torch.pi]]).repeat(1, 2)
    rotated, _ = kernels.reference.rotary_embedding(x, x, angles.cos(), angles.sin())
    expected = torch.tensor([[[0.0, 0.0, 1.0, -2.0]]])
    torch.testing.assert_close(rotated, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate(dtype):
    x = drawn((6, 48), dtype)
    close(kernels.cpu.silu_and_mul(x), kernels.reference.silu_and_mul(x))
    gate, up = x.float().chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(gate) * up).to(dtype)
    close(kernels.reference.silu_and_mul(x), expected)


@pytest.mark.parametrize("module", [kernels.cpu, kernels.reference])
def test_store_writes_the_slots_and_no_other(module):
    k, v = drawn((3, 2, 4), torch.float32), drawn((3, 2, 4), torch.float32, 1)
    cache = KVCache(torch.zeros(2, 8, 4), torch.zeros(2, 8, 4))
    slots = torch.tensor([6, 1, 3])
    module.store_kv(k, v, cache, slots)
    for new, pool in ((k, cache.k), (v, cache.v)):
        assert torch.equal(pool[:, slots], new.transpose(0, 1))
        assert pool.count_nonzero() == new.count_nonzero()


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_kv_is_off_by_half_a_step_at_most(bits):
    x = drawn((5, 2, 16), torch.float32) * 3
    pool = torch.zeros(2, 8, 16 * bits // 8, dtype=torch.uint8)
    params = torch.zeros(2, 8, 2, dtype=torch.float16)
    cache = KVCache(pool, pool.clone(), bits, params, params.clone())
    slots = torch.tensor([6, 1, -1, 3, 0])
    kernels.reference.store_kv(x, -x, cache, slots)
    read = kernels.reference.dequantize_kv(cache.k, cache.k_params, bits)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            step = params[:, slot, :1].float()
            # The float16 zero may lie a little above the smallest element, which is then held.
            assert ((read[:, slot] - x[token]).abs() <= 0.5 * step + 4e-3).all()
    assert not params[:, [2, 4, 5, 7]].any()  # padding was not stored
