"""RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backend.layers.linear import BuildContext
from backend.layers.linear_method import WeightSlot, whole
from kernels import ops


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019).

    Args:
        name: in the checkpoint, without ".weight".
    """

    def __init__(self, size: int, eps: float, name: str, context: BuildContext) -> None:
        super().__init__()
        self.eps = eps
        self.name = name
        weight = torch.empty(size, dtype=context.dtype, device=context.device)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def weight_slots(self) -> dict[str, WeightSlot]:
        """The checkpoint's tensor for this layer, by name."""
        return {f"{self.name}.weight": whole(self.weight)}

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual)."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps)
