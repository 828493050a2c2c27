"""The specification of every op in `kernels.ops`: plain torch, float32 inside, written to be read.

Runs on any device. The other packages are tested against this one; see `kernels.ops` for shapes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ops import AttentionMetadata, KVCache
from kernels.packing import W4Weight, W8Weight, dequantize_w4


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `kernels.ops.rms_norm`."""
    x32 = x.float()
    scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (x32 * scale * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.add_rms_norm`."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_and_mul(x: Tensor) -> Tensor:
    """See `kernels.ops.silu_and_mul`."""
    gate, up = x.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, batch_invariant: bool = False
) -> Tensor:
    """See `kernels.ops.linear`. One product a row when the bits must not depend on the others."""
    if batch_invariant:
        rows = [_product(row.unsqueeze(0), weight.float(), bias) for row in x]
        return torch.cat(rows).to(x.dtype)
    return _product(x, weight.float(), bias).to(x.dtype)


def linear_w4(
    x: Tensor, weight: W4Weight, bias: Tensor | None, batch_invariant: bool = False
) -> Tensor:
    """See `kernels.ops.linear_w4`."""
    return linear(x, dequantize_w4(weight), bias, batch_invariant)


def gated_linear_w4(x: Tensor, weight: W4Weight, batch_invariant: bool = False) -> Tensor:
    """See `kernels.ops.gated_linear_w4`."""
    return silu_and_mul(linear_w4(x, weight, None, batch_invariant))


def linear_w8(
    x: Tensor, weight: W8Weight, bias: Tensor | None, batch_invariant: bool = False
) -> Tensor:
    """See `kernels.ops.linear_w8`. Sums of whole numbers: exact in float64, in any order."""
    x32 = x.float()
    scales = x32.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127
    quantized = (x32 / scales).round().double()
    product = (quantized @ weight.qweight.double().t()).float() * scales * weight.scales
    return (product if bias is None else product + bias.float()).to(x.dtype)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.float(), weight, None if bias is None else bias.float())


def rotary_embedding(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.rotary_embedding`."""
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary_dim = cos.shape[-1]
    rotated, rest = x[..., :rotary_dim].float(), x[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    # cos and sin [T, R] apply to every head: [T, 1, R].
    out = rotated * cos[:, None, :] + turned * sin[:, None, :]
    return torch.cat((out.to(x.dtype), rest), dim=-1)


def store_kv(k: Tensor, v: Tensor, cache: KVCache, slot_mapping: Tensor) -> None:
    """See `kernels.ops.store_kv`."""
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    for x, pool, params in ((k, cache.k, cache.k_params), (v, cache.v, cache.v_params)):
        x = x[kept].transpose(0, 1)  # [K, T, D], as the pools lie
        if params is None:
            pool[:, slots] = x
            continue
        if cache.static:
            used = params[:, slots]
        else:
            used = kv_params(x, cache.bits)
            params[:, slots] = used
        pool[:, slots] = quantize_kv(x, used, cache.bits)


def kv_params(x: Tensor, bits: int) -> Tensor:
    """Scale and zero of each vector, float16 [..., 2] for x [..., D]."""
    low, high = torch.aminmax(x.float(), dim=-1)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-7)
    return torch.stack((scale, low), dim=-1).half()


def quantize_kv(x: Tensor, params: Tensor, bits: int) -> Tensor:
    """x [..., D] by params [..., 2] as the pools hold it: uint8 [..., D] or [..., D / 2]."""
    scale, zero = params.float().unsqueeze(-2).unbind(-1)
    q = ((x.float() - zero) / scale).round().clamp(0, 2**bits - 1).to(torch.uint8)
    if bits == 8:
        return q
    low, high = q.chunk(2, dim=-1)
    return low | (high << 4)


def dequantize_kv(pool: Tensor, params: Tensor | None, bits: int) -> Tensor:
    """What a pool's slots mean, float32 [..., D]."""
    if params is None:
        return pool.float()
    if bits == 4:
        pool = torch.cat((pool & 0xF, pool >> 4), dim=-1)
    scale, zero = params.float().unsqueeze(-2).unbind(-1)
    return pool.float() * scale + zero


def paged_attention(
    q: Tensor,
    cache: KVCache,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """See `kernels.ops.paged_attention`. Reads the KV through `block_table`, token by token."""
    group = q.shape[1] // cache.k.shape[0]
    outputs = []
    start = 0
    for index, query_len in enumerate(metadata.query_lens):
        seq_len = metadata.seq_lens[index]
        key_positions = torch.arange(seq_len, device=q.device)
        blocks = metadata.block_table[index, key_positions // metadata.block_size].long()
        slots = blocks * metadata.block_size + key_positions % metadata.block_size
        # [H, seq_len, D]
        keys = _read(cache.k, cache.k_params, slots, cache.bits).repeat_interleave(group, dim=0)
        values = _read(cache.v, cache.v_params, slots, cache.bits).repeat_interleave(group, dim=0)
        queries = q[start : start + query_len].float()  # [query_len, H, D]
        scores = torch.einsum("qhd,hkd->hqk", queries, keys) * scale
        query_positions = torch.arange(seq_len - query_len, seq_len, device=q.device)
        distance = query_positions[:, None] - key_positions[None, :]
        hidden = distance < 0
        if window is not None:
            hidden |= distance >= window
        probabilities = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,hkd->qhd", probabilities, values))
        start += query_len
    return torch.cat(outputs).to(q.dtype)


def _read(pool: Tensor, params: Tensor | None, slots: Tensor, bits: int) -> Tensor:
    """The slots' elements, float32 [K, len(slots), D]."""
    return dequantize_kv(pool[:, slots], None if params is None else params[:, slots], bits)


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
    """See `kernels.ops.attention`."""
    q, k = rotary_embedding(q, k, cos, sin)
    store_kv(k, v, cache, metadata.slot_mapping)
    attended = paged_attention(q, cache, metadata, scale, window)
    return attended if out is None else out.copy_(attended)


def resolve_tokens(token_ids: Tensor, drawn: Tensor) -> Tensor:
    """See `kernels.ops.resolve_tokens`."""
    referred = drawn[(-1 - token_ids).clamp(min=0)].clamp(min=0)
    return torch.where(token_ids < 0, referred, token_ids)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
) -> Tensor:
    """See `kernels.ops.sample`. Of equal probabilities the lower id ranks first."""
    best, greedy = logits.max(dim=-1)
    # What float32 cannot hold would be 0, and divide nothing by nothing.
    divisor = temperature.clamp(min=1e-30)[:, None]
    # Subtracting the maximum first keeps tiny temperatures from overflowing.
    probs = ((logits - best[:, None]) / divisor).softmax(-1)
    ranked, ids = probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ranked.shape[-1], device=logits.device)
    ranked = ranked.masked_fill(rank >= top_k[:, None], 0.0)
    before = ranked.cumsum(-1) - ranked  # a token stays if those before it do not reach top_p
    keep = (before < top_p[:, None] * ranked.sum(-1, keepdim=True)) & (
        ranked >= min_p[:, None] * ranked[:, :1]
    )
    keep[:, 0] = True
    weights = torch.zeros_like(probs).scatter(1, ids, ranked * keep)
    tokens = torch.where(temperature > 0, invert(weights, uniform), greedy)
    return torch.where(torch.isfinite(best), tokens, -1)


def invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """Indices [n] where cumulated weights [n, m] pass `uniform` [n] of their total."""
    cumulated = weights.cumsum(-1, dtype=torch.float64)
    wanted = uniform.double()[:, None] * cumulated[:, -1:]
    index = torch.searchsorted(cumulated, wanted, right=True).squeeze(1)
    # Rounding may point past the last token that has any weight.
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).to(torch.uint8).argmax(-1)
    return torch.minimum(index, last)


def round_columns(
    weight: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.round_columns`."""
    left = weight.clone()
    q = torch.empty_like(left, dtype=torch.uint8)
    errors = torch.empty_like(left)
    group_size = len(left) // len(scales)
    for column in range(len(left)):
        scale, zero = scales[column // group_size], zeros[column // group_size]
        level = ((left[column] / scale).round_() + zero).clamp_(0, levels)
        q[column] = level
        error = (left[column] - (level - zero) * scale) / factor[column, column]
        left[column:] -= factor[column, column:, None] * error
        errors[column] = error
    return q, errors
