"""Attention of one layer. The KV pool and the batch's layout come as arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernels import ops
from kernels.ops import AttentionMetadata, KVCache


class AttentionCall(NamedTuple):
    """All that one layer's attention needs but the layout of the batch; see `ops.attention`."""

    q: Tensor  # [T, H, D]
    k: Tensor  # [T, K, D]
    v: Tensor
    cos: Tensor  # [T, D]
    sin: Tensor
    kv_cache: KVCache
    scale: float
    window: int | None

    def run(self, metadata: AttentionMetadata, out: Tensor | None = None) -> Tensor:
        """[T, H, D], in `out` if that is given."""
        q, k, v, cos, sin, kv_cache, scale, window = self
        return ops.attention(q, k, v, cos, sin, kv_cache, metadata, scale, window, out)

    def first(self, tokens: int) -> AttentionCall:
        """The call with the first tokens only; the others are padding."""
        if tokens == len(self.q):
            return self
        return self._with(lambda tensor: tensor[:tokens])

    def borrowed(self) -> AttentionCall:
        """The call with tensors that do not keep their memory from being used again.

        For CUDA graphs recorded in pieces: what a later piece puts there comes after this call.
        """
        return self._with(_borrowed)

    def _with(self, change: Callable[[Tensor], Tensor]) -> AttentionCall:
        q, k, v, cos, sin = map(change, self[:5])
        return self._replace(q=q, k=k, v=v, cos=cos, sin=sin)


# Who records a step in pieces passes a function, which gets the calls instead of their running.
BatchLayout = AttentionMetadata | Callable[[AttentionCall], Tensor]


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
        metadata: BatchLayout,
    ) -> Tensor:
        """q [T, H, D], k and v [T, K, D], cos and sin [T, D] -> [T, H, D]."""
        call = AttentionCall(q, k, v, cos, sin, kv_cache, self.scale, self.window)
        return metadata(call) if callable(metadata) else call.run(metadata)


class _Borrowed:
    """Memory of a GPU's tensor in the way that array libraries tell each other of it."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.element_size()
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
            "typestr": f"<i{size}",  # of any type: it has no name for bfloat16
            "data": (tensor.data_ptr(), False),
            "version": 2,
        }


def _borrowed(tensor: Tensor) -> Tensor:
    """The same numbers in a tensor that is not their owner."""
    return torch.as_tensor(_Borrowed(tensor), device=tensor.device).view(tensor.dtype)
