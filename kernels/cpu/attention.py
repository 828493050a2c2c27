"""Attention on a CPU: KV read where it lies, in runs of consecutive slots, by torch's SDPA.

Gathering pages and then calling SDPA takes up to nine times as long for long sequences. Only many
short ones are gathered, where the calls themselves would cost more than the copy.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.reference
from kernels.ops import AttentionMetadata, KVCache

Run = tuple[int, int]  # first slot, length

# Gathering wins from this many sequences on, while K of each is this small. Measured with 16
# sequences of 64, 128 and 256 tokens of 128 float32 numbers: 159, 212 and 364 µs a layer, against
# 368, 387 and 458 one by one (two threads); 233, 385, 733 against 369, 432, 664 (one thread).
PADDED_MIN_SEQUENCES = 4
PADDED_MAX_BYTES = 64 << 10


def paged_attention(
    q: Tensor,
    cache: KVCache,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """See `kernels.ops.paged_attention`. Reads the KV through `kv_runs`.

    Of the metadata it needs only the host's lists; no slot of another sequence is ever read.
    """
    if cache.bits != 16:
        cache, metadata = _dequantized(cache, metadata, q.dtype)
    if window is not None and max(metadata.seq_lens) <= window:
        window = None  # it hides nothing yet
    if window is None and _many_short(q, cache, metadata):
        return _decode_padded(q, cache, metadata, scale)
    # [1, K, N, D]: of these, a run is a view.
    k_pool, v_pool = cache.k.unsqueeze(0), cache.v.unsqueeze(0)
    outputs = []
    start = 0
    for query_len, seq_len, runs in zip(
        metadata.query_lens, metadata.seq_lens, metadata.kv_runs, strict=True
    ):
        queries = q.narrow(0, start, query_len)
        start += query_len
        if query_len == 1:
            if window is not None:
                runs = drop_first(runs, seq_len - window)
            outputs.append(_decode(queries, k_pool, v_pool, runs, scale))
        elif window is not None and seq_len > window:
            outputs.append(_windowed(queries, k_pool, v_pool, runs, seq_len, scale, window))
        else:
            outputs.append(_prefill(queries, k_pool, v_pool, runs, seq_len, scale))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _dequantized(
    cache: KVCache, metadata: AttentionMetadata, dtype: torch.dtype
) -> tuple[KVCache, AttentionMetadata]:
    """What the sequences' runs hold, one sequence after another: a copy, so right but not fast."""
    slots: list[int] = []
    runs = []
    for sequence, length in zip(metadata.kv_runs, metadata.seq_lens, strict=True):
        runs.append([(len(slots), length)])
        for first, count in sequence:
            slots += range(first, first + count)
    chosen = torch.tensor(slots)
    pools = []
    for pool, params in ((cache.k, cache.k_params), (cache.v, cache.v_params)):
        assert params is not None
        plain = kernels.reference.dequantize_kv(pool[:, chosen], params[:, chosen], cache.bits)
        pools.append(plain.to(dtype))
    return KVCache(pools[0], pools[1]), replace(metadata, kv_runs=runs)


def _many_short(q: Tensor, cache: KVCache, metadata: AttentionMetadata) -> bool:
    """Whether this is the decoding of many short sequences, each in one run."""
    num_sequences = len(metadata.seq_lens)
    if num_sequences < PADDED_MIN_SEQUENCES or q.shape[0] != num_sequences:
        return False
    num_kv_heads, _, head_dim = cache.k.shape
    bytes_per_token = num_kv_heads * head_dim * cache.k.element_size()
    if max(metadata.seq_lens) * bytes_per_token > PADDED_MAX_BYTES:
        return False
    return all(len(runs) == 1 for runs in metadata.kv_runs)


def drop_first(runs: list[Run], count: int) -> list[Run]:
    """The runs without their first `count` slots; all of them if count <= 0."""
    kept = []
    for first, length in runs:
        if count < length:
            skipped = max(count, 0)
            kept.append((first + skipped, length - skipped))
        count -= length
    return kept


def keep_first(runs: list[Run], count: int) -> list[Run]:
    """The first `count` slots of the runs."""
    kept = []
    for first, length in runs:
        if count > 0:
            kept.append((first, min(length, count)))
        count -= length
    return kept


def _read(pool: Tensor, runs: list[Run]) -> Tensor:
    """[1, K, sum of lengths, D] of a pool [1, K, N, D]: a view if there is one run."""
    parts = [pool.narrow(2, first, length) for first, length in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _decode(q: Tensor, k_pool: Tensor, v_pool: Tensor, runs: list[Run], scale: float) -> Tensor:
    """One new token, which sees everything in the runs. q [1, H, D] -> [1, H, D].

    The query heads of one KV head are made rows of one product, so that each key is read once.
    """
    _, num_kv_heads, _, head_dim = k_pool.shape
    grouped = q.reshape(1, num_kv_heads, -1, head_dim)  # [1, K, H / K, D]
    if len(runs) == 1:
        first, length = runs[0]
        out = F.scaled_dot_product_attention(
            grouped, k_pool.narrow(2, first, length), v_pool.narrow(2, first, length), scale=scale
        )
    else:
        # Several runs: each by itself, then merged, is twice to eight times as fast as copying
        # them together from 1024 tokens on.
        out = _merge(
            [
                _attend(
                    grouped, k_pool.narrow(2, first, n), v_pool.narrow(2, first, n), False, scale
                )
                for first, n in runs
            ]
        )
    return out.reshape(q.shape)


def _prefill(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, runs: list[Run], seq_len: int, scale: float
) -> Tensor:
    """Several new tokens, after none or some that have KV already. q [Q, H, D] -> [Q, H, D].

    The past is seen by all of them and needs no mask; what is new is causal. Merging the two is
    exact, and a fifth faster than one call with a mask.
    """
    queries = q.transpose(0, 1).unsqueeze(0)  # [1, H, Q, D]
    past = seq_len - q.shape[0]
    new = drop_first(runs, past)
    parts = [
        _attend(queries, k_pool.narrow(2, first, n), v_pool.narrow(2, first, n), False, scale)
        for first, n in keep_first(runs, past)
    ]
    parts.append(_attend(queries, _read(k_pool, new), _read(v_pool, new), True, scale))
    out = parts[0][0] if len(parts) == 1 else _merge(parts)
    return out.squeeze(0).transpose(0, 1)


def _windowed(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    runs: list[Run],
    seq_len: int,
    scale: float,
    window: int,
) -> Tensor:
    """Several new tokens, the later of which no longer see the sequence's first."""
    query_len = q.shape[0]
    past = seq_len - query_len
    first_key = max(past + 1 - window, 0)  # the oldest that any of them sees
    visible = drop_first(runs, first_key)
    mask = torch.ones(query_len, seq_len - first_key, dtype=torch.bool)
    # Query i, at position past + i, sees keys past + i - window + 1 ... past + i.
    mask = mask.tril(past - first_key).triu(past - first_key - window + 1)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        _read(k_pool, visible),
        _read(v_pool, visible),
        attn_mask=mask,
        scale=scale,
        enable_gqa=True,
    )
    return out.squeeze(0).transpose(0, 1)


def _decode_padded(
    q: Tensor, cache: KVCache, metadata: AttentionMetadata, scale: float
) -> Tensor:
    """One new token each for many short sequences of one run, in one call. q [S, H, D]."""
    num_sequences, num_kv_heads, head_dim = q.shape[0], cache.k.shape[0], cache.k.shape[2]
    if "padded" not in metadata.derived:  # a third of the op's time, so once a step only
        metadata.derived["padded"] = _pad(metadata, q.dtype)
    slots, mask = metadata.derived["padded"]
    shape = (num_sequences, mask.shape[-1], num_kv_heads, head_dim)
    out = F.scaled_dot_product_attention(
        q.reshape(num_sequences, num_kv_heads, -1, head_dim),
        cache.k.transpose(0, 1).index_select(0, slots).view(shape).transpose(1, 2),
        cache.v.transpose(0, 1).index_select(0, slots).view(shape).transpose(1, 2),
        attn_mask=mask,
        scale=scale,
    )
    return out.reshape(q.shape)


def _pad(metadata: AttentionMetadata, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(slots int64 [S * longest], what to add to the scores [S, 1, 1, longest]).

    Shorter sequences are padded with their own last token, never with another's slots: masked or
    not, a NaN that someone left there would spread.
    """
    positions = torch.arange(max(metadata.seq_lens))
    last = torch.tensor(metadata.seq_lens).unsqueeze(1) - 1  # [S, 1]
    first_slots = torch.tensor([runs[0][0] for runs in metadata.kv_runs]).unsqueeze(1)
    slots = first_slots + torch.minimum(positions, last)
    mask = torch.zeros(slots.shape, dtype=dtype).masked_fill_(positions > last, -torch.inf)
    return slots.flatten(), mask[:, None, None, :]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(output [1, H, Q, D], log-sum-exp of the scores [1, H, Q]) for q [1, H, Q, D].

    torch's flash attention for CPUs, called by name because SDPA does not return the second.
    """
    result = torch._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return result[0], result[1]


def _merge(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention over all parts from attention over each (Milakov & Gimelshein 2018)."""
    weights = torch.stack([lse for _, lse in parts]).softmax(0).unsqueeze(-1)
    outputs = torch.stack([out for out, _ in parts])
    return (outputs * weights).sum(0).to(outputs.dtype)
