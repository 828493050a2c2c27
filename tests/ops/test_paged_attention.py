"""paged_attention: the reference against torch's SDPA, the CPU's own against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

import kernels.cpu
import kernels.reference
from tests.ops.paged_batches import layout, quantized, random_tensors

HEADS = [(4, 4, 16), (8, 2, 32), (6, 1, 8)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def contiguous_kv(pool, metadata, index):
    """[K, seq_len, D] of one sequence, slot by slot from its runs."""
    return torch.cat([pool[:, first : first + n] for first, n in metadata.kv_runs[index]], dim=1)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 5])
def test_reference_equals_sdpa_on_contiguous_tensors(heads, window):
    query_lens, seq_lens = [7, 1, 4], [7, 19, 12]
    metadata, slots = layout(query_lens, seq_lens, 8, scattered=True, seed=1)
    q, cache = random_tensors(sum(query_lens), slots, heads, torch.float32, seed=2)
    out = kernels.reference.paged_attention(q, cache, metadata, 0.3, window)
    start = 0
    for index, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        mask = torch.ones(query_len, seq_len, dtype=torch.bool).tril(seq_len - query_len)
        if window is not None:
            mask &= mask.triu(seq_len - query_len - window + 1)
        expected = F.scaled_dot_product_attention(
            q[start : start + query_len].transpose(0, 1),
            contiguous_kv(cache.k, metadata, index),
            contiguous_kv(cache.v, metadata, index),
            attn_mask=mask,
            scale=0.3,
            enable_gqa=True,
        ).transpose(0, 1)
        torch.testing.assert_close(out[start : start + query_len], expected, atol=2e-6, rtol=1e-5)
        start += query_len


lengths = st.tuples(st.integers(1, 20), st.integers(0, 60))  # new tokens, tokens before them


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    sequences=st.lists(lengths, min_size=1, max_size=12),
    decode_only=st.booleans(),
    heads=st.sampled_from(HEADS),
    dtype=st.sampled_from(list(TOLERANCE)),
    window=st.sampled_from([None, 1, 7, 40]),
    block_size=st.sampled_from([8, 16]),
    scattered=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_cpu_equals_reference(
    sequences, decode_only, heads, dtype, window, block_size, scattered, seed
):
    query_lens = [1 if decode_only else new for new, _ in sequences]
    seq_lens = [new + past for new, (_, past) in zip(query_lens, sequences, strict=True)]
    metadata, slots = layout(query_lens, seq_lens, block_size, scattered, seed)
    q, cache = random_tensors(sum(query_lens), slots, heads, dtype, seed)
    scale = heads[2] ** -0.5
    expected = kernels.reference.paged_attention(q, cache, metadata, scale, window)
    out = kernels.cpu.paged_attention(q, cache, metadata, scale, window)
    assert out.dtype == dtype and out.shape == expected.shape
    torch.testing.assert_close(out, expected, atol=TOLERANCE[dtype], rtol=1e-2)


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("seq_len", [30, 900])  # short ones are gathered, long ones read in place
def test_cpu_decode_of_many_sequences(seq_len, scattered):
    query_lens, seq_lens = [1] * 9, [seq_len - 3 * i for i in range(9)]
    metadata, slots = layout(query_lens, seq_lens, 16, scattered, seed=3)
    q, cache = random_tensors(9, slots, (8, 2, 32), torch.float32, seed=4)
    expected = kernels.reference.paged_attention(q, cache, metadata, 0.2)
    out = kernels.cpu.paged_attention(q, cache, metadata, 0.2)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("num_sequences", [2, 9])
@pytest.mark.parametrize("window", [None, 6])
def test_cpu_keeps_a_neighbours_nan_to_the_neighbour(num_sequences, window):
    query_lens, seq_lens = [1] * num_sequences, [5 + 3 * i for i in range(num_sequences)]
    metadata, slots = layout(query_lens, seq_lens, 8, scattered=False, seed=3)
    q, cache = random_tensors(num_sequences, slots, (4, 2, 16), torch.float32, seed=4)
    expected = kernels.cpu.paged_attention(q, cache, metadata, 0.2, window)
    own = {slot for first, n in metadata.kv_runs[1] for slot in range(first, first + n)}
    others = [slot for slot in range(slots) if slot not in own]
    cache.k[:, others], cache.v[:, others] = torch.nan, torch.nan
    out = kernels.cpu.paged_attention(q, cache, metadata, 0.2, window)
    assert torch.equal(out[1], expected[1])


@pytest.mark.parametrize("decode_only", [False, True])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_cpu_equals_reference_on_quantized_pools(bits, static, decode_only):
    query_lens, seq_lens = [1, 1, 1, 1] if decode_only else [1, 7, 3, 12], [9, 30, 3, 12]
    metadata, slots = layout(query_lens, seq_lens, 8, scattered=True, seed=5)
    q, plain = random_tensors(sum(query_lens), slots, (4, 2, 16), torch.float32, seed=6)
    cache = quantized(plain, bits, static)
    expected = kernels.reference.paged_attention(q, cache, metadata, 0.25)
    out = kernels.cpu.paged_attention(q, cache, metadata, 0.25)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    exact = kernels.reference.paged_attention(q, plain, metadata, 0.25)
    assert 0 < float((out - exact).abs().max()) < (0.03 if bits == 8 else 0.6)
