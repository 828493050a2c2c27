"""How large the KV pool becomes: by share, blocks, tokens or GB, and what is refused."""

from __future__ import annotations

import pytest
import torch

from backend.config import EngineConfig
from backend.engine.kv_cache import KVShape, allocate, prefill_copy_bytes
from backend.engine.kv_plan import plan_blocks, usable_session_len
from backend.errors import UserError

LLAMA_7B = KVShape(32, 32, 128, torch.float16, 0)
GB = 10**9


def planned(free: int = 100 * GB, step_bytes: int = GB, session_len: int = 4096, **options) -> int:
    config = EngineConfig(**options)
    return plan_blocks(config, LLAMA_7B.bytes_per_token, session_len, free, step_bytes)


@pytest.mark.parametrize(
    ("policy", "bits", "size"), [(0, 16, 524288), (8, 8, 270336), (4, 4, 139264)]
)
def test_bytes_of_a_token(policy, bits, size):
    shape = KVShape(32, 32, 128, torch.float16, policy)
    assert (shape.bits, shape.bytes_per_token) == (bits, size)


@pytest.mark.parametrize("policy", [0, 4, 8])
def test_the_pools_take_what_was_counted(policy):
    shape = KVShape(3, 2, 16, torch.bfloat16, policy)
    pools = allocate(shape, 24, torch.device("cpu"))
    tensors = [t for p in pools for t in (p.k, p.v, p.k_params, p.v_params) if t is not None]
    assert len(pools) == 3 and all(pool.bits == (policy or 16) for pool in pools)
    assert sum(t.numel() * t.element_size() for t in tensors) == 24 * shape.bytes_per_token


def test_a_share_of_what_is_free():
    block = 64 * LLAMA_7B.bytes_per_token
    assert planned(cache_max_entry_count=0.5) == 50 * GB // block
    assert planned(cache_max_entry_count=0.999) == 99 * GB // block  # a step needs its part
    # One conversation of 4096 tokens can never use more than 64 blocks.
    assert planned(cache_max_entry_count=0.5, max_batch_size=1) == 64


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        (dict(cache_max_entry_count=17), 17),
        (dict(kv_cache_tokens=2048), 32),
        (dict(kv_cache_tokens=2049), 33),
        (dict(kv_cache_gb=1.0), GB // (64 * 524288)),
        (dict(kv_cache_tokens=1024, cache_block_seq_len=128), 8),
    ],
)
def test_asked_for_exactly(options, blocks):
    assert planned(**options) == blocks


@pytest.mark.parametrize(
    "options",
    [dict(cache_max_entry_count=9000), dict(kv_cache_tokens=10**6), dict(kv_cache_gb=99.5)],
)
def test_more_than_there_is(options):
    with pytest.raises(UserError) as error:
        planned(**options)
    assert error.value.field == next(iter(options))
    assert "98.99 GB of memory are free for it" in error.value.message


def test_two_sizes_at_once():
    with pytest.raises(UserError, match="both"):
        planned(kv_cache_tokens=64, kv_cache_gb=1.0)


def test_conversations_are_as_long_as_the_pool_lets_them():
    assert usable_session_len(10, 64, 500) == 500
    assert usable_session_len(5, 64, 500) == 320
    with pytest.raises(UserError):
        usable_session_len(1, 8, 500)


def test_the_copy_of_quantized_kv_is_of_all_sequences_up_to_a_bound():
    shape = KVShape(32, 8, 128, torch.float16, 8)
    assert prefill_copy_bytes(LLAMA_7B, 10**9) == 0
    assert prefill_copy_bytes(shape, 3 * 40960) == 3 * 40960 * 8 * 128 * 2 * 2
    assert prefill_copy_bytes(shape, 10**9) == 512 << 20
