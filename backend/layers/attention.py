"""Attention of one layer. The KV pool and the batch's layout come as arguments."""

from __future__ import annotations

from torch import Tensor, nn

from kernels import ops
from kernels.ops import AttentionMetadata, KVCache


class Attention(nn.Module):
    """Rotates the new tokens' Q and K, stores K and V, then attends over all tokens.

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
        cos: Tensor,
        sin: Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """q [T, H, D], k and v [T, K, D], cos and sin [T, D] -> [T, H, D]."""
        return ops.attention(
            q, k, v, cos, sin, kv_cache, metadata, self.scale, self.window
        )
