"""4-bit weights in groups, as AutoAWQ stores them (Lin et al. 2023), its "gemm" layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from backend.errors import UserError
from backend.layers.linear_method import LinearMethod, LinearWeight
from backend.layers.methods.unquantized import UnquantizedMethod
from kernels import ops
from kernels.packing import W4Weight, pack_w4, unpack_awq

WORD_OUTPUTS = 8  # 4-bit numbers in an int32


class AWQMethod(LinearMethod):
    """`qweight` and `qzeros` int32, `scales` float16: weight = (q - zero) * scale, by group.

    qweight is [in_features, out_features / 8], the others have a row a group of inputs. After
    loading, a layer keeps either one W4Weight (`layer.w4`, in 4 bits) or, with `dequantize_to`,
    an ordinary `weight` of that dtype: correct anywhere, but as large and as fast as 16 bits.

    Args:
        group_size: inputs that share a scale and a zero: 32, 64 or 128.
        not_converted: modules that the checkpoint keeps in 16 bit, each named by one or more
            neighbouring components of its path: "self_attn", "layers.0.mlp.down_proj".
        dequantize_to: see above; None keeps 4 bits, for `kernels.ops.linear_w4`.
    """

    output_multiple = WORD_OUTPUTS

    def __init__(
        self,
        group_size: int,
        not_converted: Sequence[str] = (),
        dequantize_to: torch.dtype | None = None,
    ) -> None:
        self.group_size = group_size
        self.input_multiple = group_size
        self.not_converted = tuple(not_converted)
        self.dequantize_to = dequantize_to
        self.unquantized = UnquantizedMethod()

    def for_layer(self, names: Sequence[str]) -> LinearMethod:
        kept = [name for name in names if self._is_kept(name)]
        if kept and len(kept) < len(names):
            other = next(name for name in names if name not in kept)
            raise UserError(
                f"modules_to_not_convert in config.json names {kept[0]} but not {other}; the two "
                "are one product here and must be stored alike.",
                "Quantize the model again with both or neither of them.",
            )
        return self.unquantized if kept else self

    def _is_kept(self, name: str) -> bool:
        return any(f".{entry.strip('.')}." in f".{name}." for entry in self.not_converted)

    def create_weights(
        self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, LinearWeight]:
        """`dtype` is the activations' and has no part in what is stored."""
        words, groups = out_features // WORD_OUTPUTS, in_features // self.group_size
        qweight = torch.empty(in_features, words, dtype=torch.int32, device=device)
        qzeros = torch.empty(groups, words, dtype=torch.int32, device=device)
        scales = torch.empty(groups, out_features, dtype=torch.float16, device=device)
        return {
            "qweight": LinearWeight(qweight, 1, 0, output_divisor=WORD_OUTPUTS),
            "qzeros": LinearWeight(
                qzeros, 1, 0, output_divisor=WORD_OUTPUTS, input_divisor=self.group_size
            ),
            "scales": LinearWeight(scales, 1, 0, input_divisor=self.group_size),
        }

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        qweight, qzeros, scales = (_take(layer, name) for name in ("qweight", "qzeros", "scales"))
        q, zeros = unpack_awq(qweight), unpack_awq(qzeros)  # uint8 [in, out], [groups, out]
        del qweight, qzeros  # the peak is this layer's, not twice the model's
        if self.dequantize_to is not None:
            weight = torch.empty(q.shape[::-1], dtype=self.dequantize_to, device=q.device)
            weight.copy_(dequantize(q, scales, zeros).t())
            layer.weight = nn.Parameter(weight, requires_grad=False)
            self.unquantized.process_weights_after_loading(layer)
            return
        packed = pack_w4(q.t(), scales.t(), zeros.t(), self.group_size)
        layer.w4 = packed  # type: ignore[assignment]
        # Parameters too, so that a model's bytes can be counted.
        layer.qweight = nn.Parameter(packed.qweight, requires_grad=False)
        layer.scale_zero = nn.Parameter(packed.scale_zero, requires_grad=False)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.dequantize_to is not None:
            return self.unquantized.apply(layer, x, bias)
        return ops.linear_w4(x, _packed(layer), bias, bool(layer.batch_invariant))

    def apply_gated(self, layer: nn.Module, x: Tensor) -> Tensor:
        if self.dequantize_to is not None or layer.bias is not None:
            return super().apply_gated(layer, x)
        return ops.gated_linear_w4(x, _packed(layer), bool(layer.batch_invariant))


def dequantize(q: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """(q - zero) * scale, float32 [in, out], of uint8 [in, out] and [groups, out] each."""
    grouped = q.view(scales.shape[0], -1, q.shape[1]).float()
    weight = grouped.sub_(zeros.unsqueeze(1)).mul_(scales.float().unsqueeze(1))
    return weight.flatten(0, 1)


def _take(layer: nn.Module, name: str) -> Tensor:
    """Remove a parameter from its layer and return what it held."""
    parameter = getattr(layer, name)
    assert isinstance(parameter, Tensor)
    delattr(layer, name)
    return parameter.data


def _packed(layer: nn.Module) -> W4Weight:
    packed = layer.w4
    assert isinstance(packed, W4Weight)
    return packed
