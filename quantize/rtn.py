"""Round to nearest in groups: the form every 4-bit weight here has, and the baseline of its search.

A row of a matrix is cut into groups of `group_size` inputs; a group has a scale (float16) and a
zero point, and an element is (q - zero) * scale with q from 0 to 2**bits - 1. Rounding is
round(weight / scale) + zero: an element is at most half a step off. (Rounding weight - min by
itself, as LMDeploy 0.2.4 did, is twice that: its zero point is rounded a second time.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backend.errors import UserError

GROUP_SIZES = (32, 64, 128)
STUDY_BITS = (3, 4, 8)  # what can be rounded to; checkpoints hold 4
SMALLEST_SCALE = 2.0**-24  # of float16
LARGEST_SCALE = 65504.0


@dataclass(frozen=True)
class GroupFormat:
    """How a matrix is cut and rounded.

    Attributes:
        bits: 3, 4 or 8.
        group_size: inputs that share a scale and a zero point: 32, 64 or 128.
        symmetric: the zero point is the middle, 2**(bits - 1), for every group.

    Raises:
        UserError: a size that there is not.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in STUDY_BITS:
            raise UserError(
                f"Weights of {self.bits} bits are not supported.", "Use 4.", field="w_bits"
            )
        if self.group_size not in GROUP_SIZES:
            raise UserError(
                f"The group size {self.group_size} is not supported.",
                "Use 128, 64 or 32.",
                field="w_group_size",
            )

    @property
    def levels(self) -> int:
        """The largest q."""
        return 2**self.bits - 1

    def check(self, name: str, in_features: int) -> None:
        """Whether rows of `in_features` can be cut into whole groups.

        Raises:
            UserError: naming the matrix.
        """
        if in_features % self.group_size:
            fits = [size for size in GROUP_SIZES if in_features % size == 0]
            raise UserError(
                f"{name} has {in_features} inputs, which the group size {self.group_size} does "
                "not divide.",
                f"Use the group size {max(fits)}." if fits else "This model cannot be quantized.",
                field="w_group_size",
            )


@dataclass(frozen=True)
class GroupQuantized:
    """A matrix [N, K] as whole numbers: (q - zeros) * scales, by groups of K / G inputs."""

    q: Tensor  # uint8 [N, K]
    scales: Tensor  # float16 [N, G]
    zeros: Tensor  # uint8 [N, G]

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        groups = self.q.unflatten(1, (self.scales.shape[1], -1)).float()
        groups = (groups - self.zeros.unsqueeze(-1)) * self.scales.float().unsqueeze(-1)
        return groups.flatten(1)

    def rows(self, start: int, length: int) -> GroupQuantized:
        """The rows from `start` on: one matrix of several that are stored together."""
        return GroupQuantized(
            *(x.narrow(0, start, length) for x in (self.q, self.scales, self.zeros))
        )


def group_parameters(
    weight: Tensor, form: GroupFormat, shrink: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """Scales (float16) and zero points (uint8) of weight float32 [N, K], both [N, K / group].

    The range always holds 0: a zero point outside 0 to 2**bits - 1 could not be stored.

    Args:
        shrink: part of each group's range that is kept, from 0 to 1; [N, K / group] or one
            number. What lies outside is clipped.

    Raises:
        ValueError: the weights are too large for a float16 scale, or not finite.
    """
    low, high = weight.unflatten(1, (-1, form.group_size)).aminmax(dim=-1)
    if form.symmetric:
        largest = torch.maximum(high, -low) * shrink
        scales = largest / (2 ** (form.bits - 1) - 1)
    else:
        low, high = low.clamp(max=0) * shrink, high.clamp(min=0) * shrink
        scales = (high - low) / form.levels
    if not bool((scales <= LARGEST_SCALE).all()):
        raise ValueError("weights that float16 scales cannot express")
    # Rounded first: what is divided by must be what is stored.
    scales = scales.half().clamp(min=SMALLEST_SCALE)
    if form.symmetric:
        zeros = torch.full_like(scales, 2 ** (form.bits - 1))
    else:
        zeros = (-low / scales.float()).round().clamp(0, form.levels)
    return scales, zeros.to(torch.uint8)


def round_to_groups(
    weight: Tensor, scales: Tensor, zeros: Tensor, form: GroupFormat
) -> GroupQuantized:
    """weight float32 [N, K] to the nearest numbers that these groups can hold."""
    groups = weight.unflatten(1, (-1, form.group_size))
    q = (groups / scales.float().unsqueeze(-1)).round_() + zeros.unsqueeze(-1)
    return GroupQuantized(q.clamp_(0, form.levels).to(torch.uint8).flatten(1), scales, zeros)


def quantize(
    weight: Tensor, form: GroupFormat, shrink: Tensor | float = 1.0
) -> GroupQuantized:
    """weight [N, K] of any float dtype, rounded to nearest; `shrink` as `group_parameters`.

    Raises:
        UserError: K is no multiple of the group size.
        ValueError: weights that float16 scales cannot express.
    """
    form.check("The matrix", weight.shape[1])
    weight = weight.float()
    return round_to_groups(weight, *group_parameters(weight, form, shrink), form)
