"""Rotary position embedding (Su et al. 2021) and the ways to stretch it over longer contexts.

The formulas are those of transformers' `modeling_rope_utils`; Qwen's own is that of its
modeling_qwen.py. Frequencies that follow a sequence's length (dynamic, longrope) do so in steps:
`length_bounds` says where one ends. All tokens of a sequence are rotated by the frequencies of its
step, so whoever crosses a bound has its KV recomputed (`Scheduler`), and blocks of KV are shared
within a step only (`BlockManager`): a reply does not depend on what was computed before or beside
it. (transformers keeps the keys of shorter lengths as they are.)
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backend.errors import UserError


@dataclass(frozen=True)
class RopeParameters:
    """`rope_parameters` of a config.json; which ones matter depends on `rope_type`.

    That may also be QWEN_DYNAMIC, which no config.json says: Qwen has a switch of its own for it.
    """

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


QWEN_DYNAMIC = "qwen_dynamic"
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


def length_bounds(
    rope: RopeParameters, max_position_embeddings: int, session_len: int
) -> tuple[int, ...]:
    """Longest sequence of each step, so that the last holds `session_len` tokens.

    Dynamic NTK doubles its steps as Qwen does; for other models each doubling has one step
    between. So a sequence is stretched for at most half as much again as it has, and on its way to
    any length it recomputes no more than 3.5 times as many tokens.
    """
    trained = max_position_embeddings
    if rope.rope_type == "longrope":
        original = rope.original_max_position_embeddings or trained
        return (original, session_len) if session_len > original else (original,)
    if rope.rope_type not in ("dynamic", QWEN_DYNAMIC):
        return (max(trained, session_len),)
    bounds, doubled = [trained], trained
    while bounds[-1] < session_len:
        if rope.rope_type == "dynamic":
            bounds.append(doubled * 3 // 2)
        doubled *= 2
        bounds.append(doubled)
    if len(bounds) > 1 and bounds[-2] >= session_len:
        bounds.pop()
    return tuple(bounds)


def inverse_frequencies(
    rope: RopeParameters, head_dim: int, max_position_embeddings: int, length: int
) -> tuple[Tensor, float]:
    """(angle per position of each pair, float32 [head_dim / 2]; factor of cos and sin).

    `length`: of the sequence, in tokens.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / rope.rope_theta**exponents
    original = rope.original_max_position_embeddings or max_position_embeddings
    if rope.rope_type == "linear":
        return plain / _given(rope.factor), 1.0
    if rope.rope_type in ("dynamic", QWEN_DYNAMIC):
        ratio = max(length / max_position_embeddings, 1.0)
        if rope.rope_type == QWEN_DYNAMIC:
            stretch = 2.0 ** math.ceil(math.log2(ratio) + 1) - 1
        else:
            stretch = _given(rope.factor) * (ratio - 1) + 1
        base = rope.rope_theta * stretch ** (head_dim / (head_dim - 2))
        return 1.0 / base**exponents, 1.0
    if rope.rope_type == "llama3":
        return _llama3(rope, plain, original), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, head_dim, max_position_embeddings, original)
    if rope.rope_type == "longrope":
        factors = rope.long_factor if length > original else rope.short_factor
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


class Rotation(NamedTuple):
    """How a step's T tokens are rotated: what the layers get of their positions."""

    cos: Tensor  # float32 [T, head_dim]
    sin: Tensor
    query_scale: Tensor | None = None  # [T, 1, 1] in the queries' dtype; None: 1


class RotaryEmbedding(nn.Module):
    """Rotations by the tokens' positions, computed once a forward pass for all layers.

    No table: at 128k positions one takes 128 MB, and these few operations take some 10 µs.

    Args:
        session_len: longest sequence.
        logn_dtype: of the queries, where these are scaled by the logarithm of their position to
            base `max_position_embeddings`, counted from 1 (Su 2021; Qwen): beyond that length
            attention would else spread over more and more tokens. None: they are not.

    Attributes:
        bounds: as `length_bounds` gives them.
    """

    inv_freq: Tensor

    def __init__(
        self,
        rope: RopeParameters,
        head_dim: int,
        max_position_embeddings: int,
        session_len: int,
        device: torch.device,
        logn_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.bounds = length_bounds(rope, max_position_embeddings, session_len)
        found = [
            inverse_frequencies(rope, head_dim, max_position_embeddings, length)
            for length in self.bounds
        ]
        self.attention_scaling = found[0][1]  # of all lengths
        # A row a step; repeated over both halves, as the op wants cos and sin.
        table = torch.stack([torch.cat((row, row)) for row, _ in found]).to(device)
        self.register_buffer("inv_freq", table, persistent=False)
        self._trained = max_position_embeddings
        self._logn_dtype = logn_dtype

    def step_of(self, length: int) -> int:
        """The step of a sequence of so many tokens."""
        return bisect_left(self.bounds, length)

    def forward(self, positions: Tensor, steps: Tensor | int = 0) -> Rotation:
        """positions int64 [T] of tokens whose sequences are in `steps`, int64 [T] or one for all.

        The steps may lie on the device, and change under a CUDA graph.
        """
        if len(self.bounds) == 1:
            steps = 0  # spares a kernel
        angles = positions[:, None].float() * self.inv_freq[steps]
        cos, sin = angles.cos(), angles.sin()
        if self.attention_scaling != 1.0:
            cos, sin = cos * self.attention_scaling, sin * self.attention_scaling
        if self._logn_dtype is None:
            return Rotation(cos, sin)
        scale = (positions + 1).float().log() / math.log(max(self._trained, 2))
        return Rotation(cos, sin, scale.clamp(min=1.0).to(self._logn_dtype)[:, None, None])
