"""The op `attention` on a GPU: decode rows by one kernel, the rest by two or three."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.kv_store import rope_and_store
from kernels.gpu.kv_tiles import check
from kernels.gpu.prefill_attention import prefill_attention
from kernels.ops import AttentionMetadata, KVCache


def store_kv(k: Tensor, v: Tensor, cache: KVCache, slot_mapping: Tensor) -> None:
    """See `kernels.ops.store_kv`."""
    rope_and_store(k, v, None, cache, slot_mapping)


def paged_attention(
    q: Tensor,
    cache: KVCache,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """See `kernels.ops.paged_attention`."""
    check(q, None, cache)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    prefill_attention(out, q, None, cache, metadata, scale, window)
    return out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: KVCache,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `kernels.ops.attention`.

    With `batch_invariant` all tokens go the way of prefill, in tiles of one size: what a token's
    row adds up, and in which order, then depends on nothing but its own sequence.
    """
    check(q, k, cache)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    decodes = 0 if metadata.batch_invariant else metadata.num_decodes
    if decodes:
        decode_attention(out, q, k, v, cos, sin, cache, metadata, scale, window)
    if q.shape[0] > decodes:
        new = slice(decodes, None)
        rotary = (cos, sin)
        rope_and_store(k[new], v[new], (cos[new], sin[new]), cache, metadata.slot_mapping[new])
        prefill_attention(out, q, rotary, cache, metadata, scale, window, first_sequence=decodes)
    return out
