"""Rotary position embedding (Su et al. 2021) and the ways to stretch it over longer contexts.

The formulas are those of transformers' `modeling_rope_utils`. Where transformers lets the
frequencies follow the length reached so far (dynamic, longrope), they are fixed here by the
session's length: a cached key must not depend on what was computed before or beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backend.errors import UserError


@dataclass(frozen=True)
class RopeParameters:
    """`rope_parameters` of a config.json; which ones matter depends on `rope_type`."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    attention_factor: float | None = None  # yarn, longrope
    beta_fast: float | None = None  # yarn
    beta_slow: float | None = None  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn
    short_factor: tuple[float, ...] = ()  # longrope, one a frequency
    long_factor: tuple[float, ...] = ()  # longrope, one a frequency


# What each type cannot do without.
REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}


def check_rope(rope: RopeParameters, head_dim: int) -> None:
    """Check that the type is known and has what it needs.

    Raises:
        UserError: naming the type or the parameter.
    """
    if rope.rope_type not in REQUIRED:
        raise UserError(
            f"config.json: rope type {rope.rope_type!r} is unknown.",
            f"Known types: {', '.join(REQUIRED)}.",
        )
    for name in REQUIRED[rope.rope_type]:
        if getattr(rope, name) in (None, ()):
            raise UserError(
                f"config.json: rope type {rope.rope_type} needs {name}, which is missing."
            )
    if rope.rope_type == "llama3" and rope.low_freq_factor == rope.high_freq_factor:
        raise UserError("config.json: low_freq_factor and high_freq_factor must differ.")
    if rope.rope_type == "longrope":
        for name in ("short_factor", "long_factor"):
            count = len(getattr(rope, name))
            if count != head_dim // 2:
                raise UserError(
                    f"config.json: {name} has {count} entries; head_dim {head_dim} needs "
                    f"{head_dim // 2}."
                )


def inverse_frequencies(
    rope: RopeParameters, head_dim: int, max_position_embeddings: int, session_len: int
) -> tuple[Tensor, float]:
    """(angle per position of each pair, float32 [head_dim / 2]; factor of cos and sin)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / rope.rope_theta**exponents
    original = rope.original_max_position_embeddings or max_position_embeddings
    if rope.rope_type == "linear":
        return plain / _given(rope.factor), 1.0
    if rope.rope_type == "dynamic":
        length = max(session_len, max_position_embeddings)
        factor = _given(rope.factor)
        stretch = factor * length / max_position_embeddings - (factor - 1)
        base = rope.rope_theta * stretch ** (head_dim / (head_dim - 2))
        return 1.0 / base**exponents, 1.0
    if rope.rope_type == "llama3":
        return _llama3(rope, plain, original), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, head_dim, max_position_embeddings, original)
    if rope.rope_type == "longrope":
        factors = rope.long_factor if session_len > original else rope.short_factor
        stretched = 1.0 / (torch.tensor(factors, dtype=torch.float32) * rope.rope_theta**exponents)
        scaling = rope.attention_factor
        if scaling is None:
            ratio = rope.factor or max_position_embeddings / original
            scaling = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        return stretched, scaling
    return plain, 1.0


def _given(value: float | None) -> float:
    assert value is not None  # check_rope has seen to it
    return value


def _llama3(rope: RopeParameters, plain: Tensor, original: int) -> Tensor:
    """Llama 3.1: long waves are stretched, short ones kept, those between blended."""
    factor = _given(rope.factor)
    low, high = _given(rope.low_freq_factor), _given(rope.high_freq_factor)
    wavelength = 2 * math.pi / plain
    blend = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * plain / factor + blend * plain


def _yarn(
    rope: RopeParameters, head_dim: int, max_position_embeddings: int, original: int
) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023): interpolate slow rotations, keep fast ones, scale the scores."""
    factor = rope.factor or max_position_embeddings / original

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    scaling = rope.attention_factor
    if scaling is None:
        if rope.mscale and rope.mscale_all_dim:
            scaling = mscale(rope.mscale) / mscale(rope.mscale_all_dim)
        else:
            scaling = mscale(1.0)

    def dimension(rotations: float) -> float:
        """The pair that makes this many rotations within the original context."""
        turns = math.log(original / (rotations * 2 * math.pi))
        return head_dim * turns / (2 * math.log(rope.rope_theta))

    low, high = dimension(rope.beta_fast or 32.0), dimension(rope.beta_slow or 1.0)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # transformers' guard against a ramp of no width
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies = rope.rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return ramp / (factor * frequencies) + (1 - ramp) / frequencies, scaling


class RotaryEmbedding(nn.Module):
    """cos and sin of the tokens' positions, computed once a step for all layers.

    No table: at 128k positions one takes 128 MB, and these few operations take some 10 µs.

    Args:
        session_len: longest sequence; see this module's head for what it changes.
    """

    inv_freq: Tensor

    def __init__(
        self,
        rope: RopeParameters,
        head_dim: int,
        max_position_embeddings: int,
        session_len: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        inv_freq, self.attention_scaling = inverse_frequencies(
            rope, head_dim, max_position_embeddings, session_len
        )
        # Repeated over both halves, as the op wants cos and sin.
        both = torch.cat((inv_freq, inv_freq)).to(device)
        self.register_buffer("inv_freq", both, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions int64 [T] -> cos, sin float32 [T, head_dim]."""
        angles = positions[:, None].float() * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        if self.attention_scaling != 1.0:
            cos, sin = cos * self.attention_scaling, sin * self.attention_scaling
        return cos, sin
