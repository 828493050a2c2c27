"""What a weight format must say for itself. Layers and models know nothing else of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels import ops


@dataclass(frozen=True)
class WeightSlot:
    """Where one tensor of a checkpoint goes on this rank: `destination` takes `source` of it.

    Attributes:
        shape: the whole tensor's shape in the checkpoint.
        source: this rank's part of it, one slice a dimension.
        destination: a view of a parameter, of the shape that `source` cuts out.
    """

    shape: tuple[int, ...]
    source: tuple[slice, ...]
    destination: Tensor


def whole(parameter: Tensor) -> WeightSlot:
    """The slot of a parameter that every rank keeps in full."""
    return WeightSlot(
        tuple(parameter.shape), tuple(slice(0, n) for n in parameter.shape), parameter.data
    )


@dataclass(frozen=True)
class LinearWeight:
    """A stored tensor of a linear layer, and which of its dimensions are output and input.

    None means that the tensor has no such dimension (a bias has no input). A divisor is how many
    features one element stands for: 8 outputs of 4 bits in an int32, a group's inputs in a scale.
    """

    tensor: Tensor
    output_dim: int | None
    input_dim: int | None
    output_divisor: int = 1
    input_divisor: int = 1


class LinearMethod(ABC):
    """A weight format: which tensors a linear layer stores, and how x is multiplied by them.

    `apply` finds in the layer, beside its tensors, `bias` and `batch_invariant`.

    Attributes:
        output_multiple: what a rank keeps of a checkpoint's tensor must begin and end at whole
            multiples of so many outputs.
        input_multiple: the same of inputs.
    """

    output_multiple = 1
    input_multiple = 1

    def for_layer(self, names: Sequence[str]) -> LinearMethod:
        """The format of a layer's weights; `names` are its parts' in the checkpoint.

        Raises:
            UserError: the parts of one layer are stored in different formats.
        """
        return self

    @abstractmethod
    def create_weights(
        self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, LinearWeight]:
        """Uninitialised tensors of one layer on one rank, by their names in a checkpoint."""

    @abstractmethod
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Bring the layer's loaded tensors into the layout that `apply` wants."""

    @abstractmethod
    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in_features] times the layer's weight, plus bias; [T, out_features]."""

    def apply_gated(self, layer: nn.Module, x: Tensor) -> Tensor:
        """silu(gate) * up of the layer's product, whose first half is the gate: [T, out / 2]."""
        bias = layer.bias
        assert bias is None or isinstance(bias, Tensor)
        return ops.silu_and_mul(self.apply(layer, x, bias))
