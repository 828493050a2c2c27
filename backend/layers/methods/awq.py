"""4-bit weights in groups, as AutoAWQ stores them (Lin et al. 2023), its "gemm" layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from backend.layers.linear_method import LinearWeight
from backend.layers.methods.quantized import QuantizedMethod
from kernels import ops
from kernels.cpu.linear_w4 import pack as pack_for_cpu
from kernels.packing import TILE_COLUMNS, TILE_ROWS, WORDS, W4Weight, pack_w4, unpack_awq

# A checkpoint's qweight, qzeros and scales, and the group size.
Pack = Callable[[Tensor, Tensor, Tensor, int], W4Weight]

WORD_OUTPUTS = 8  # 4-bit numbers in an int32
# Outputs unpacked at a time, whole tiles and words: the temporaries of a 7B model's largest run are
# then 230 MB, and a matrix takes one to six runs of 1 ms on the host.
RUN_OUTPUTS = 4096


class AWQMethod(QuantizedMethod):
    """`qweight` and `qzeros` int32, `scales` float16: weight = (q - zero) * scale, by group.

    qweight is [in_features, out_features / 8], the others have a row a group of inputs. After
    loading, a layer keeps either one W4Weight (`layer.w4`, in 4 bits) or, with `dequantize_to`,
    an ordinary `weight` of that dtype: correct anywhere, but as large and as fast as 16 bits.

    Args:
        group_size: inputs that share a scale and a zero: 32, 64 or 128.
        not_converted: modules that the checkpoint keeps in 16 bit; see QuantizedMethod.
        dequantize_to: see above; None keeps 4 bits, for `kernels.ops.linear_w4`.
        pack: makes its W4Weight of qweight, qzeros, scales and the group size.
    """

    output_multiple = WORD_OUTPUTS

    def __init__(
        self,
        group_size: int,
        not_converted: Sequence[str] = (),
        dequantize_to: torch.dtype | None = None,
        pack: Pack | None = None,
    ) -> None:
        super().__init__(not_converted)
        self.group_size = group_size
        self.input_multiple = group_size
        self.dequantize_to = dequantize_to
        self.pack = pack or pack_tiles

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
        if self.dequantize_to is not None:
            weight = _dequantize(qweight, qzeros, scales, self.dequantize_to)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            self.unquantized.process_weights_after_loading(layer)
            return
        packed = self.pack(qweight, qzeros, scales, self.group_size)
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


def _runs(
    qweight: Tensor, qzeros: Tensor, scales: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """A layer's tensors as (outputs, q uint8 [in, n], zeros uint8 and scales [groups, n])."""
    for start in range(0, scales.shape[1], RUN_OUTPUTS):
        words = slice(start // WORD_OUTPUTS, (start + RUN_OUTPUTS) // WORD_OUTPUTS)
        outputs = slice(start, min(start + RUN_OUTPUTS, scales.shape[1]))
        yield (
            outputs,
            unpack_awq(qweight[:, words]),
            unpack_awq(qzeros[:, words]),
            scales[:, outputs],
        )


def pack_tiles(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> W4Weight:
    """A checkpoint's tensors in the layout of `kernels.packing`, which a GPU's kernels read."""
    inputs, rows = qweight.shape[0], scales.shape[1]
    row_tiles, column_tiles = -(-rows // TILE_ROWS), -(-inputs // TILE_COLUMNS)
    groups = column_tiles * TILE_COLUMNS // group_size
    # The result is taken first: it fits where the layer before had its checkpoint's tensors,
    # and no temporary's block is broken up for it.
    words = qweight.new_empty(row_tiles, column_tiles, TILE_ROWS, WORDS)
    scale_zero = qweight.new_empty(row_tiles, groups, TILE_ROWS)
    for outputs, q, zeros, part in _runs(qweight, qzeros, scales):
        packed = pack_w4(q.t(), part.t(), zeros.t(), group_size)
        tiles = slice(outputs.start // TILE_ROWS, -(-outputs.stop // TILE_ROWS))
        words[tiles] = packed.qweight
        scale_zero[tiles] = packed.scale_zero
    return W4Weight(words, scale_zero, group_size, rows, inputs)


def pack_runs(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> W4Weight:
    """A checkpoint's tensors in the layout of `kernels.cpu.linear_w4`."""
    parts = [
        pack_for_cpu(q.t(), part.t(), zeros.t(), group_size)
        for _, q, zeros, part in _runs(qweight, qzeros, scales)
    ]
    return W4Weight(
        torch.cat([part.qweight for part in parts]),
        torch.cat([part.scale_zero for part in parts], dim=1),
        group_size,
        scales.shape[1],
        qweight.shape[0],
    )


def _dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(q - zero) * scale, computed in float32: [out, in]."""
    weight = scales.new_empty(scales.shape[1], qweight.shape[0], dtype=dtype)
    for outputs, q, zeros, part in _runs(qweight, qzeros, scales):
        grouped = q.view(part.shape[0], -1, q.shape[1]).float()  # [groups, group_size, n]
        grouped = (grouped - zeros.unsqueeze(1)) * part.float().unsqueeze(1)
        weight[outputs] = grouped.flatten(0, 1).t()
    return weight


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
