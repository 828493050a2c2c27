"""Weights of 8 bits with a scale an output, tokens of 8 bits with a scale each (W8A8).

What makes this accurate, the smoothing of the inputs (Xiao et al. 2023), is in the checkpoint's
norms and weights already: nothing of it is left to do here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backend.layers.linear_method import LinearWeight
from backend.layers.methods.quantized import QuantizedMethod
from kernels import ops
from kernels.cpu.linear_w8 import reorder
from kernels.dispatch import is_reference_only
from kernels.packing import W8Weight


class SmoothQuantMethod(QuantizedMethod):
    """`weight` int8 [out_features, in_features], `scale` float32 [out_features, 1]: LMDeploy's.

    After loading, a layer keeps one W8Weight, `layer.w8`. With several ranks, a row-parallel
    layer's inputs are rounded by each rank's part of them: a little finer than by one.
    """

    def create_weights(
        self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, LinearWeight]:
        """`dtype` is the activations' and has no part in what is stored."""
        weight = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        scale = torch.empty(out_features, 1, dtype=torch.float32, device=device)
        return {"weight": LinearWeight(weight, 0, 1), "scale": LinearWeight(scale, 0, None)}

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        weight, scale = layer.weight, layer.scale
        assert isinstance(weight, Tensor) and isinstance(scale, Tensor)
        del layer.weight, layer.scale
        stored = W8Weight(weight.data, scale.data.flatten())
        if stored.qweight.device.type == "cpu" and not is_reference_only():
            stored = reorder(stored)
        layer.w8 = stored  # type: ignore[assignment]
        # Parameters too, so that a model's bytes can be counted.
        layer.qweight = nn.Parameter(stored.qweight, requires_grad=False)
        layer.scales = nn.Parameter(stored.scales, requires_grad=False)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        stored = layer.w8
        assert isinstance(stored, W8Weight)
        return ops.linear_w8(x, stored, bias, bool(layer.batch_invariant))
