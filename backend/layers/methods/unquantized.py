"""Weights as they are: float32, bfloat16 or float16."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backend.layers.linear_method import LinearMethod, LinearWeight
from kernels import ops
from kernels.dispatch import is_reference_only


class UnquantizedMethod(LinearMethod):
    """`weight` [out_features, in_features], in the layout that the device multiplies fastest.

    On a CPU (2 cores with AMX, torch 2.13; 3072 x 512, 1 and 16 rows, µs): bfloat16 reordered
    once for oneDNN takes 92 and 98, F.linear 136 and 161; float32 stored column by column takes
    101 and 256, F.linear 118 and 514. Either pays off for every size and number of rows tried.
    """

    def create_weights(
        self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, LinearWeight]:
        weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
        return {"weight": LinearWeight(weight, output_dim=0, input_dim=1)}

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if weight.device.type != "cpu" or is_reference_only():
            return
        if weight.dtype == torch.float32:
            weight = weight.t().contiguous().t()
        elif weight.dtype == torch.bfloat16 and _onednn_has_bfloat16():
            weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        layer.weight = nn.Parameter(weight, requires_grad=False)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        if x.is_cuda or is_reference_only():
            return ops.linear(x, weight, bias, bool(layer.batch_invariant))
        return F.linear(x, weight, bias)


def _onednn_has_bfloat16() -> bool:
    """Whether this build of torch has oneDNN and this CPU the instructions it wants."""
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
