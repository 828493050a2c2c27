"""Weights as they are: float32, bfloat16 or float16."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backend.layers.linear_method import LinearMethod, LinearWeight


class UnquantizedMethod(LinearMethod):
    """`weight` [out_features, in_features], multiplied by F.linear."""

    def create_weights(
        self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, LinearWeight]:
        weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
        return {"weight": LinearWeight(weight, output_dim=0, input_dim=1)}

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, layer.weight, bias)  # type: ignore[arg-type]
