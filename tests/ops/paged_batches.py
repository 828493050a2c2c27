"""Random paged batches for tests of ops: pools, tables and runs that belong together."""

from __future__ import annotations

import random

import torch
from torch import Tensor

import kernels.reference
from kernels.ops import AttentionMetadata, KVCache


def layout(
    query_lens: list[int],
    seq_lens: list[int],
    block_size: int,
    scattered: bool,
    seed: int,
    blocks_for: int = 0,
) -> tuple[AttentionMetadata, int]:
    """(metadata, number of slots) of sequences whose blocks lie scattered or in single runs.

    `blocks_for` tokens get blocks at least, so that a sequence keeps its blocks while it grows.
    """
    generator = random.Random(seed)
    counts = [-(-max(length, blocks_for) // block_size) for length in seq_lens]
    free = list(range(sum(counts) + 3))
    if scattered:
        generator.shuffle(free)
    tables, runs = [], []
    for count, length in zip(counts, seq_lens, strict=True):
        table = [free.pop(0) for _ in range(count)]
        tables.append(table)
        runs.append(runs_of(table, length, block_size))
    width = max(counts)
    slots = [
        table[position // block_size] * block_size + position % block_size
        for table, query_len, seq_len in zip(tables, query_lens, seq_lens, strict=True)
        for position in range(seq_len - query_len, seq_len)
    ]
    starts = [0]
    for query_len in query_lens:
        starts.append(starts[-1] + query_len)
    metadata = AttentionMetadata(
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        block_table=torch.tensor(
            [table + [0] * (width - len(table)) for table in tables], dtype=torch.int32
        ),
        cu_seqlens_q=torch.tensor(starts, dtype=torch.int32),
        seq_lens_k=torch.tensor(seq_lens, dtype=torch.int32),
        query_lens=query_lens,
        seq_lens=seq_lens,
        kv_runs=runs,
        block_size=block_size,
    )
    return metadata, (sum(counts) + 3) * block_size


def runs_of(table: list[int], seq_len: int, block_size: int) -> list[tuple[int, int]]:
    """A block table as (first slot, length) runs of consecutive blocks."""
    runs: list[tuple[int, int]] = []
    for index, block in enumerate(table[: -(-seq_len // block_size)]):
        length = min(block_size, seq_len - index * block_size)
        if runs and runs[-1][0] + runs[-1][1] == block * block_size:
            runs[-1] = (runs[-1][0], runs[-1][1] + length)
        else:
            runs.append((block * block_size, length))
    return runs


def random_tensors(
    num_tokens: int, num_slots: int, heads: tuple[int, int, int], dtype: torch.dtype, seed: int
) -> tuple[Tensor, KVCache]:
    """q [T, H, D] and pools [K, N, D] for heads = (H, K, D)."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads, head_dim = heads
    q = torch.randn(num_tokens, num_heads, head_dim, generator=generator)
    pools = torch.randn(2, num_kv_heads, num_slots, head_dim, generator=generator)
    return q.to(dtype), KVCache(pools[0].to(dtype), pools[1].to(dtype))


def quantized(plain: KVCache, bits: int, static: bool) -> KVCache:
    """The pools in 8 or 4 bits, with parameters a slot or, if `static`, a head."""
    made = []
    for pool in (plain.k, plain.v):
        if static:
            whole = kernels.reference.kv_params(pool.flatten(1), bits)  # [K, 2]
            params = whole[:, None, :].expand(-1, pool.shape[1], -1)
        else:
            params = kernels.reference.kv_params(pool, bits)
        made.append((kernels.reference.quantize_kv(pool, params, bits), params))
    (k, k_params), (v, v_params) = made
    return KVCache(k, v, bits, k_params, v_params, static)
