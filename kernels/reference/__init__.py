"""The specification of every op in `kernels.ops`: plain torch, float32 inside, written to be read.

Runs on any device. The other packages are tested against this one; see `kernels.ops` for shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.ops import AttentionMetadata


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `kernels.ops.rms_norm`."""
    x32 = x.float()
    scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (x32 * scale * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.add_rms_norm`. The sum is rounded to the inputs' dtype before the norm."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rotary_embedding(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.rotary_embedding`."""
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary_dim = cos.shape[-1]
    rotated, rest = x[..., :rotary_dim].float(), x[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    # cos and sin [T, R] apply to every head: [T, 1, R].
    out = rotated * cos[:, None, :] + turned * sin[:, None, :]
    return torch.cat((out.to(x.dtype), rest), dim=-1)


def silu_and_mul(x: Tensor) -> Tensor:
    """See `kernels.ops.silu_and_mul`."""
    gate, up = x.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """See `kernels.ops.store_kv`."""
    k_cache[slot_mapping] = k
    v_cache[slot_mapping] = v


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """See `kernels.ops.paged_attention`. Reads the KV through `block_table`, token by token."""
    group = q.shape[1] // k_cache.shape[1]
    outputs = []
    start = 0
    for index, query_len in enumerate(metadata.query_lens):
        seq_len = metadata.seq_lens[index]
        key_positions = torch.arange(seq_len, device=q.device)
        blocks = metadata.block_table[index, key_positions // metadata.block_size].long()
        slots = blocks * metadata.block_size + key_positions % metadata.block_size
        keys = k_cache[slots].float().repeat_interleave(group, dim=1)  # [seq_len, H, D]
        values = v_cache[slots].float().repeat_interleave(group, dim=1)
        queries = q[start : start + query_len].float()  # [query_len, H, D]
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        query_positions = torch.arange(seq_len - query_len, seq_len, device=q.device)
        distance = query_positions[:, None] - key_positions[None, :]
        hidden = distance < 0
        if window is not None:
            hidden |= distance >= window
        probabilities = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", probabilities, values))
        start += query_len
    return torch.cat(outputs).to(q.dtype)
