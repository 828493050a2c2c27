"""What a weight format must say for itself. Layers and models know nothing else of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn


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

    None means that the tensor has no such dimension (a bias has no input).
    """

    tensor: Tensor
    output_dim: int | None
    input_dim: int | None


class LinearMethod(ABC):
    """A weight format: which tensors a linear layer stores, and how x is multiplied by them."""

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
        """x [..., in_features] times the layer's weight, plus bias; [..., out_features]."""
