"""The operations of a decoder: the contract; `kernels.dispatch` chooses by device.

Each op exists under one name in `kernels.reference` (plain torch, float32 inside, obvious: the
specification) and, where a device has something faster, in `kernels.cpu` or `kernels.gpu`.
Callers use only this module. Imports torch, nothing else of ours but `kernels.packing`'s data and
the dispatch; the device's module is imported at its first use.

Shapes: T tokens of all sequences one after another, S sequences, H query heads, K KV heads (H is a
multiple of K), D head_dim, N slots of the KV pool (num_blocks * block_size).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kernels.dispatch import implementation
from kernels.packing import W4Weight, W8Weight


@dataclass(slots=True)
class KVCache:
    """One layer's pool of keys and values, a head's slots side by side.

    With `bits` 16 the pools hold the model's own dtype (float32 too). With 8 and 4 they hold whole
    numbers q from 0 to 2**bits - 1, and an element is q * scale + zero, scale and zero being those
    of its token and head. With 4 bits, byte d < D / 2 holds element d in its low half and element
    d + D / 2 in its high half.

    `static` parameters were measured beforehand, one pair a head: k_params and v_params are then
    views that repeat it for every slot, and are read, never written. Otherwise whoever stores a
    token computes them from its own smallest and largest element.
    """

    k: Tensor  # [K, N, D], or uint8 [K, N, D] (8 bits), or uint8 [K, N, D / 2] (4 bits)
    v: Tensor
    bits: int = 16
    k_params: Tensor | None = None  # float16 [K, N, 2]: scale, zero
    v_params: Tensor | None = None
    static: bool = False


@dataclass(slots=True)
class AttentionMetadata:
    """Where the tokens of a step lie. Passed as an argument through the model.

    Sequence s has `query_lens[s]` new tokens, the last of its `seq_lens[s]` tokens. A slot is
    `block * block_size + offset`; a token with slot -1 is padding, and is not stored. A sequence
    of length 0 is padding too: its one row of output means nothing.

    The tensors are on the model's device; the lists say the same on the host, for code that loops
    over sequences. `kv_runs[s]` lists `(first_slot, length)` runs that hold the sequence's KV in
    order; the block manager keeps them few, so that a CPU reads slabs instead of gathering pages.
    The CPU's ops read the lists only: there, all tensors but `slot_mapping` may be empty. A GPU's
    read the tensors, and of the host's numbers only the last four, which shape the launch: within
    a CUDA graph they are bounds, while the tensors change under it.
    """

    slot_mapping: Tensor  # int64 [T]: where each new token's K and V go
    block_table: Tensor  # int32 [S, max_blocks], padded with 0
    cu_seqlens_q: Tensor  # int32 [S + 1]
    seq_lens_k: Tensor  # int32 [S]
    query_lens: list[int]
    seq_lens: list[int]
    kv_runs: list[list[tuple[int, int]]]
    block_size: int
    num_decodes: int = 0  # the first so many sequences have one new token each
    max_query_len: int = 0  # of the others
    max_seq_len: int = 0  # of all
    batch_invariant: bool = False  # a sequence's bits must not depend on the others
    # What an op worked out from the above in one layer, for the layers after it.
    derived: dict[str, Any] = field(default_factory=dict)


# Bytes of 16-bit KV that attention of prompts may make of a quantized pool, to read it faster.
LARGEST_KV_COPY = 512 << 20


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension (Zhang & Sennrich 2019).

    x [..., hidden] any float dtype, weight [hidden]; returns x's shape and dtype.
    """
    return implementation("rms_norm", x.device.type)(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); x and residual [..., hidden] of one dtype.

    The sum is rounded to that dtype before the norm. `residual` may be overwritten by the sum.
    """
    return implementation("add_rms_norm", x.device.type)(x, residual, weight, eps)


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up for x [..., 2 * intermediate] = gate ‖ up; returns [..., intermediate]."""
    return implementation("silu_and_mul", x.device.type)(x)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, batch_invariant: bool = False
) -> Tensor:
    """x [T, in_features] times weight [out_features, in_features] of x's dtype, plus bias.

    Returns [T, out_features] of x's dtype. With `batch_invariant`, a row of the result has the
    same bits whatever the other rows are and however many.
    """
    return implementation("linear", x.device.type)(x, weight, bias, batch_invariant)


def linear_w4(
    x: Tensor, weight: W4Weight, bias: Tensor | None, batch_invariant: bool = False
) -> Tensor:
    """The same with weights of 4 bits in groups (W4A16); x float16 or bfloat16.

    On a CPU x may be float32 too.
    """
    return implementation("linear_w4", x.device.type)(x, weight, bias, batch_invariant)


def gated_linear_w4(x: Tensor, weight: W4Weight, batch_invariant: bool = False) -> Tensor:
    """silu_and_mul(linear_w4(x, weight, None)): the first half of the rows are the gate's.

    The product need not be rounded to x's dtype in between.
    """
    return implementation("gated_linear_w4", x.device.type)(x, weight, batch_invariant)


def linear_w8(
    x: Tensor, weight: W8Weight, bias: Tensor | None, batch_invariant: bool = False
) -> Tensor:
    """The same with int8 weights, a scale a row, and x rounded to int8, a scale a token (W8A8).

    A token's scale is its largest absolute element / 127; the product is summed in int32.
    """
    return implementation("linear_w8", x.device.type)(x, weight, bias, batch_invariant)


def rotary_embedding(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q [T, H, D] and k [T, K, D] by position (Su et al. 2021), the halves paired.

    cos, sin [T, R] of the tokens' positions, float32 and repeated over both halves; R <= D is
    the rotated part, the rest passes unchanged. Returns new tensors of the inputs' dtypes.
    """
    return implementation("rotary_embedding", q.device.type)(q, k, cos, sin)


def store_kv(k: Tensor, v: Tensor, cache: KVCache, slot_mapping: Tensor) -> None:
    """Write k, v [T, K, D] into the pools at slot_mapping int64 [T], quantized as they ask.

    With 8 or 4 bits: scale = (max - min) / (2**bits - 1), at least 1e-7, and zero = min, both
    rounded to float16; then q = round((x - zero) / scale), held to its range.
    """
    implementation("store_kv", k.device.type)(k, v, cache, slot_mapping)


def paged_attention(
    q: Tensor,
    cache: KVCache,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention of each sequence's new tokens over all its tokens, read from the pools.

    q [T, H, D] (query head h reads KV head h // (H // K)); the pools already hold the new tokens.
    With `window`, a token sees the last `window` tokens, itself included. Returns [T, H, D].
    """
    return implementation("paged_attention", q.device.type)(q, cache, metadata, scale, window)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: KVCache,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`rotary_embedding`, `store_kv` and `paged_attention` in one: what a layer calls.

    `out` [T, H, D], contiguous, is where the result is put and what is returned, if it is given.
    """
    return implementation("attention", q.device.type)(
        q, k, v, cos, sin, cache, metadata, scale, window, out
    )


def resolve_tokens(token_ids: Tensor, drawn: Tensor) -> Tensor:
    """Token ids int64 [T] with what an earlier step drew put in where they refer to it.

    -1 - row stands for drawn[row] (int64 [S]); a row that drew nothing (-1) gives token 0.
    """
    return implementation("resolve_tokens", token_ids.device.type)(token_ids, drawn)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
) -> Tensor:
    """Draw a token a row: int64 [S]; -1 where the largest logit is not a finite number.

    logits float32 [S, vocab]; the others [S]: top_k int64 (at least vocab: all), the rest float32.
    Temperature 0 takes the largest logit (the first of equals). Otherwise, of the probabilities
    softmax(logits / temperature): the top_k largest stay; of these, as many of the largest as are
    needed to reach top_p of their sum; of these, those of at least min_p times the largest. Then
    `uniform`, in [0, 1), picks from what stays by its cumulated sum in the vocabulary's order.
    """
    return implementation("sample", logits.device.type)(
        logits, temperature, top_k, top_p, min_p, uniform
    )


def round_columns(
    weight: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """Round columns of a matrix in order; the later ones make up for the earlier (GPTQ).

    Column c of the matrix is row c here: weight float32 [C, N], factor float32 [C, C] the upper
    triangular part of the inverse second moment's Cholesky factor that belongs to these columns,
    scales and zeros float32 [G, N] of groups of C / G columns each, rows side by side in memory.

    Column c is rounded to q = round(w / scale) + zero, held to 0 to `levels`; its error, divided by
    factor[c, c], is taken from each column d > c of these, times factor[c, d]. Returns q uint8
    [C, N] and the divided errors float32 [C, N], for the columns that are not here.
    """
    return implementation("round_columns", weight.device.type)(
        weight, factor, scales, zeros, levels
    )
