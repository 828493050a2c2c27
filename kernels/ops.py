"""The operations of a decoder: the contract, then dispatch by device.

Each op exists under one name in `kernels.reference` (plain torch, float32 inside, obvious: the
specification) and, where a device has something faster, in `kernels.cpu` or `kernels.gpu`.
Callers use only this module. Imports torch, nothing else of ours; the device's module is imported
at its first use.

Shapes: T tokens of all sequences one after another, S sequences, H query heads, K KV heads (H is a
multiple of K), D head_dim, N slots of the KV pool (num_blocks * block_size).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor


@dataclass(slots=True)
class AttentionMetadata:
    """Where the tokens of a step lie. Passed as an argument through the model.

    Sequence s has `query_lens[s]` new tokens, the last of its `seq_lens[s]` tokens. A slot is
    `block * block_size + offset`.

    The tensors are on the model's device; the lists say the same on the host, for code that loops
    over sequences. `kv_runs[s]` lists `(first_slot, length)` runs that hold the sequence's KV in
    order; the block manager keeps them few, so that a CPU reads slabs instead of gathering pages.
    The CPU's ops read the lists only: there, all tensors but `slot_mapping` may be empty.
    """

    slot_mapping: Tensor  # int64 [T]: where each new token's K and V go
    block_table: Tensor  # int32 [S, max_blocks], padded with 0
    cu_seqlens_q: Tensor  # int32 [S + 1]
    seq_lens_k: Tensor  # int32 [S]
    query_lens: list[int]
    seq_lens: list[int]
    kv_runs: list[list[tuple[int, int]]]
    block_size: int
    # What an op worked out from the above in one layer, for the layers after it.
    derived: dict[str, Any] = field(default_factory=dict)


# Device type -> the module with its own forms of some ops. GPUs run the reference so far.
OWN_FORMS = {"cpu": "kernels.cpu"}


@cache
def implementation(name: str, device_type: str) -> Callable[..., Any]:
    """The function that serves op `name` on `device_type`: the device's own, else the reference."""
    if device_type in OWN_FORMS:
        found = getattr(importlib.import_module(OWN_FORMS[device_type]), name, None)
        if found is not None:
            return found
    return getattr(importlib.import_module("kernels.reference"), name)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension (Zhang & Sennrich 2019).

    x [..., hidden] any float dtype, weight [hidden]; returns x's shape and dtype.
    """
    return implementation("rms_norm", x.device.type)(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); x and residual [..., hidden] of one dtype."""
    return implementation("add_rms_norm", x.device.type)(x, residual, weight, eps)


def rotary_embedding(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q [T, H, D] and k [T, K, D] by position (Su et al. 2021), the halves paired.

    cos, sin [T, R] of the tokens' positions, float32 and repeated over both halves; R <= D is
    the rotated part, the rest passes unchanged. Returns new tensors of the inputs' dtypes.
    """
    return implementation("rotary_embedding", q.device.type)(q, k, cos, sin)


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up for x [..., 2 * intermediate] = gate ‖ up; returns [..., intermediate]."""
    return implementation("silu_and_mul", x.device.type)(x)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write k, v [T, K, D] into the pools k_cache, v_cache [N, K, D] at slot_mapping int64 [T]."""
    implementation("store_kv", k.device.type)(k, v, k_cache, v_cache, slot_mapping)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention of each sequence's new tokens over all its tokens, read from the pools.

    q [T, H, D] (query head h reads KV head h // (H // K)), pools [N, K, D] of q's dtype, already
    holding the new tokens. With `window`, a token sees the last `window` tokens, itself included.
    Returns [T, H, D].
    """
    return implementation("paged_attention", q.device.type)(
        q, k_cache, v_cache, metadata, scale, window
    )
