"""Linear layers of a tensor-parallel decoder, fused where a checkpoint has several tensors.

A fused layer's parameter holds the rows of its parts one after another; `weight_slots` says which
tensor of the checkpoint fills which rows, so that loading needs no knowledge of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backend.errors import UserError
from backend.layers.linear_method import LinearMethod, LinearWeight, WeightSlot
from backend.layers.parallel import ParallelContext


@dataclass(frozen=True)
class BuildContext:
    """What every layer of a model is built with."""

    dtype: torch.dtype
    device: torch.device
    parallel: ParallelContext
    linear_method: LinearMethod  # of the decoder's layers; the output head is never quantized
    batch_invariant: bool = False  # a sequence's bits must not depend on the others


@dataclass(frozen=True)
class OutputPart:
    """The rows of a column-parallel layer that come from one tensor of the checkpoint."""

    name: str  # in the checkpoint, without ".weight"
    size: int  # output features of the whole tensor
    start: int  # the first that this rank keeps
    length: int  # how many it keeps


class LinearLayer(nn.Module):
    """Tensors as the method wants them, and an optional bias [out_features]. See the subclasses."""

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        context: BuildContext,
        method: LinearMethod,
    ) -> None:
        super().__init__()
        self.in_features = in_features  # on this rank
        self.out_features = out_features  # on this rank
        self.parallel = context.parallel
        self.batch_invariant = context.batch_invariant
        self.method = method
        self.weights = self.method.create_weights(
            in_features, out_features, context.dtype, context.device
        )
        if bias:
            tensor = torch.empty(out_features, dtype=context.dtype, device=context.device)
            self.weights["bias"] = LinearWeight(tensor, output_dim=0, input_dim=None)
        else:
            self.register_parameter("bias", None)
        for name, weight in self.weights.items():
            self.register_parameter(name, nn.Parameter(weight.tensor, requires_grad=False))

    def weight_slots(self) -> dict[str, WeightSlot]:
        """Where the checkpoint's tensors for this layer go, by their names there."""
        raise NotImplementedError

    def process_weights_after_loading(self) -> None:
        """Call once, when every slot is filled."""
        self.weights = {}  # the method may replace the tensors; let go of them
        self.method.process_weights_after_loading(self)


class ColumnParallelLinear(LinearLayer):
    """y = x Wᵀ + b, the output features split over the ranks; several parts make one product.

    forward: x [..., in_features] -> [..., sum of the parts' lengths], the parts one after another.
    """

    def __init__(
        self, in_features: int, parts: Sequence[OutputPart], bias: bool, context: BuildContext
    ) -> None:
        method = context.linear_method.for_layer([part.name for part in parts])
        for part in parts:
            _check_multiple(part.name, "inputs", in_features, method.input_multiple, context)
            for count in (part.start, part.length, part.size):
                _check_multiple(part.name, "outputs", count, method.output_multiple, context)
        super().__init__(in_features, sum(p.length for p in parts), bias, context, method)
        self.parts = tuple(parts)

    def weight_slots(self) -> dict[str, WeightSlot]:
        slots = {}
        for key, weight in self.weights.items():
            offset = 0
            for part in self.parts:
                shape = list(weight.tensor.shape)
                source = [slice(0, n) for n in shape]
                destination = weight.tensor
                if weight.output_dim is not None:
                    divisor = weight.output_divisor
                    start, length = part.start // divisor, part.length // divisor
                    shape[weight.output_dim] = part.size // divisor
                    source[weight.output_dim] = slice(start, start + length)
                    destination = destination.narrow(
                        weight.output_dim, offset // divisor, length
                    )
                slots[f"{part.name}.{key}"] = WeightSlot(tuple(shape), tuple(source), destination)
                offset += part.length
        return slots

    def forward(self, x: Tensor) -> Tensor:
        return self.method.apply(self, x, self.bias)


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several tensors with the same input, such as gate and up, each split evenly.

    Args:
        outputs: (name in the checkpoint, output features) of each.
    """

    def __init__(
        self,
        in_features: int,
        outputs: Sequence[tuple[str, int]],
        bias: bool,
        context: BuildContext,
    ) -> None:
        parts = []
        for name, size in outputs:
            length = context.parallel.divide(size, f"rows of {name}")
            parts.append(OutputPart(name, size, context.parallel.rank * length, length))
        super().__init__(in_features, parts, bias, context)

    def gated(self, x: Tensor) -> Tensor:
        """silu(first output) * second, for a layer of two: [T, in_features] -> [T, length]."""
        return self.method.apply_gated(self, x)


class QKVParallelLinear(ColumnParallelLinear):
    """Q, K and V in one product, split by heads. If ranks outnumber KV heads, they share them.

    Args:
        names: of Q, K and V in the checkpoint.

    Raises:
        UserError: if the ranks do not divide the heads.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        names: tuple[str, str, str],
        bias: bool,
        context: BuildContext,
    ) -> None:
        parallel = context.parallel
        heads = parallel.divide(num_heads, "attention heads")
        kv_heads = kv_heads_per_rank(num_kv_heads, parallel)
        kv_start = parallel.rank * num_kv_heads // parallel.world_size
        q, k, v = names
        super().__init__(
            hidden_size,
            [
                OutputPart(
                    q, num_heads * head_dim,
                    parallel.rank * heads * head_dim, heads * head_dim,
                ),
                *(
                    OutputPart(
                        name, num_kv_heads * head_dim, kv_start * head_dim, kv_heads * head_dim
                    )
                    for name in (k, v)
                ),
            ],
            bias,
            context,
        )


def _check_multiple(
    name: str, what: str, count: int, multiple: int, context: BuildContext
) -> None:
    if count % multiple == 0:
        return
    ranks = context.parallel.world_size
    if ranks == 1:
        raise UserError(
            f"{name} has {count} {what}, which its quantization cannot store: they must be a "
            f"multiple of {multiple}.",
            "config.json's sizes and its quantization_config do not belong together.",
        )
    raise UserError(
        f"At tp {ranks} a rank's part of {name} would begin or end at {count} {what}, within one "
        f"of the units of {multiple} that its quantization stores together.",
        "Choose a smaller tp.",
        field="tp",
    )


def kv_heads_per_rank(num_kv_heads: int, parallel: ParallelContext) -> int:
    """KV heads that one rank keeps: its share, or one that it has in common with other ranks.

    Raises:
        UserError: if neither divides the other.
    """
    if parallel.world_size <= num_kv_heads:
        return parallel.divide(num_kv_heads, "KV heads")
    if parallel.world_size % num_kv_heads:
        raise UserError(
            f"tp {parallel.world_size} is no multiple of the model's {num_kv_heads} KV heads.",
            f"Choose a tp that divides {num_kv_heads}, or a multiple of it.",
            field="tp",
        )
    return 1


class RowParallelLinear(LinearLayer):
    """y = x Wᵀ + b, the input features split over the ranks and the partial sums added up.

    forward: x [..., in_features / ranks] -> [..., out_features], the same on every rank.

    Args:
        name: in the checkpoint, without ".weight".
    """

    def __init__(
        self, in_features: int, out_features: int, name: str, bias: bool, context: BuildContext
    ) -> None:
        length = context.parallel.divide(in_features, f"columns of {name}")
        method = context.linear_method.for_layer([name])
        _check_multiple(name, "inputs", length, method.input_multiple, context)
        _check_multiple(name, "outputs", out_features, method.output_multiple, context)
        super().__init__(length, out_features, bias, context, method)
        self.name = name
        self.whole_in_features = in_features

    def weight_slots(self) -> dict[str, WeightSlot]:
        slots = {}
        for key, weight in self.weights.items():
            shape = list(weight.tensor.shape)
            source = [slice(0, n) for n in shape]
            if weight.input_dim is not None:
                divisor = weight.input_divisor
                length = self.in_features // divisor
                start = self.parallel.rank * length
                shape[weight.input_dim] = self.whole_in_features // divisor
                source[weight.input_dim] = slice(start, start + length)
            slots[f"{self.name}.{key}"] = WeightSlot(tuple(shape), tuple(source), weight.tensor)
        return slots

    def forward(self, x: Tensor) -> Tensor:
        # The bias must be added once, not once a rank.
        bias = self.bias if self.parallel.rank == 0 else None
        return self.parallel.all_reduce(self.method.apply(self, x, bias))
