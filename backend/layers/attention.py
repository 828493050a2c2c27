"""Attention of one layer. The KV pools and the batch's layout come as arguments."""

from __future__ import annotations

from torch import Tensor, nn

from kernels import ops
from kernels.ops import AttentionMetadata


class Attention(nn.Module):
    """Stores the new tokens' K and V, then attends over all of them.

    Args:
        scale: of the scores, usually head_dim ** -0.5.
        window: tokens that a token sees, itself included; None sees all.
    """

    def __init__(self, scale: float, window: int | None) -> None:
        super().__init__()
        self.scale = scale
        self.window = window

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        metadata: AttentionMetadata,
    ) -> Tensor:
        """q [T, H, D], k and v [T, K, D], pools [N, K, D] -> [T, H, D]."""
        k_cache, v_cache = kv_cache
        ops.store_kv(k, v, k_cache, v_cache, metadata.slot_mapping)
        return ops.paged_attention(q, k_cache, v_cache, metadata, self.scale, self.window)
