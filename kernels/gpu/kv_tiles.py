"""Parts that the attention kernels share: rotating, quantizing, finding and widening KV.

A vector of a head is handled in parts, so that unpacking moves nothing between threads. Quantized
pools are read as 16-bit words, which tensor cores' loads can transpose: word j holds elements 2j
and 2j + 1 (8 bits), or those and D / 2 further on (4 bits). So there is one part (16 bits), or an
even and an odd one (8), or those two of each half (4): a, b, c, d, where the missing ones are 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import next_power_of_2
from kernels.ops import KVCache


@triton.jit
def rotated(
    x_ptr, cos_ptr, sin_ptr, used, WIDTH: tl.constexpr, D: tl.constexpr,
    ROTARY_DIM: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Parts [rows, WIDTH] of x as float32 after rotation, rounded to x's dtype as the reference is.

    x_ptr [rows, 1] and cos_ptr, sin_ptr (such, or one for all) point to rows' first elements, used
    [rows, 1] says which rows there are. Elements are read side by side and parted in registers:
    every second one alone takes several times as long.
    """
    b = 0.0
    c = 0.0
    d = 0.0
    if BITS == 16:
        columns = tl.arange(0, WIDTH)[None, :]
        a = _rotated(x_ptr, cos_ptr, sin_ptr, columns, used & (columns < D), ROTARY_DIM)
    else:
        columns = tl.arange(0, 2 * WIDTH)[None, :]
        mask = used & (columns < D * BITS // 8)
        x = _rotated(x_ptr, cos_ptr, sin_ptr, columns, mask, ROTARY_DIM)
        a, b = tl.split(tl.reshape(x, (x.shape[0], WIDTH, 2)))
        if BITS == 4:
            x = _rotated(x_ptr, cos_ptr, sin_ptr, columns + D // 2, mask, ROTARY_DIM)
            c, d = tl.split(tl.reshape(x, (x.shape[0], WIDTH, 2)))
    return a, b, c, d


@triton.jit
def _rotated(x_ptr, cos_ptr, sin_ptr, columns, mask, ROTARY_DIM: tl.constexpr):
    x = tl.load(x_ptr + columns, mask=mask, other=0.0)
    if ROTARY_DIM > 0:
        rotary_half: tl.constexpr = ROTARY_DIM // 2
        turned = mask & (columns < ROTARY_DIM)
        partner = tl.where(columns < rotary_half, columns + rotary_half, columns - rotary_half)
        y = tl.load(x_ptr + partner, mask=turned, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + columns, mask=turned, other=1.0)
        sin = tl.load(sin_ptr + columns, mask=turned, other=0.0)
        y = tl.where(columns < rotary_half, -y, y)
        x = (x.to(tl.float32) * cos + y * sin).to(x.dtype)
    return x.to(tl.float32)


@triton.jit
def store_output(out_ptr, a, b, c, d, used, D: tl.constexpr, BITS: tl.constexpr):
    """Write parts [rows, WIDTH] where out_ptr [rows, 1] points, in the order of a vector."""
    kind: tl.constexpr = out_ptr.dtype.element_ty
    if BITS == 16:
        columns = tl.arange(0, a.shape[1])[None, :]
        tl.store(out_ptr + columns, a.to(kind), mask=used & (columns < D))
    else:
        columns = tl.arange(0, 2 * a.shape[1])[None, :]
        mask = used & (columns < D * BITS // 8)
        tl.store(out_ptr + columns, tl.interleave(a, b).to(kind), mask=mask)
        if BITS == 4:
            tl.store(out_ptr + D // 2 + columns, tl.interleave(c, d).to(kind), mask=mask)


@triton.jit
def unpack_params(word):
    """(scale, zero) as float32 from the two float16 in an int32."""
    scale = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    zero = ((word >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), zero.to(tl.float32)


@triton.jit
def _measured(a, b, c, d, inside, BITS: tl.constexpr):
    """The int32 of (scale, zero) of each row."""
    top = tl.maximum(a, b)
    low = tl.minimum(a, b)
    if BITS == 4:
        top = tl.maximum(top, tl.maximum(c, d))
        low = tl.minimum(low, tl.minimum(c, d))
    top = tl.max(tl.where(inside, top, float("-inf")), 1)
    zero = tl.min(tl.where(inside, low, float("inf")), 1)
    steps: tl.constexpr = float(2**BITS - 1)
    scale = tl.maximum((top - zero) / steps, 1e-7)
    low_half = scale.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    high_half = zero.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    return (low_half | (high_half << 16)).to(tl.int32, bitcast=True)


@triton.jit
def _quantized(x, scale, zero, BITS: tl.constexpr):
    """Whole numbers, as float32, of x [rows, WIDTH] by scale and zero [rows]."""
    steps: tl.constexpr = float(2**BITS - 1)
    scaled = tl.minimum(tl.maximum((x - zero[:, None]) / scale[:, None], 0.0), steps)
    # Adding and taking away 1.5 * 2**23 rounds to the nearest, halves to even, as torch does.
    return (scaled + 12582912.0) - 12582912.0


@triton.jit
def store_parts(
    a, b, c, d, pool_ptr, params_ptr, words, mask, D: tl.constexpr, BITS: tl.constexpr,
    STATIC: tl.constexpr,
):  # fmt: skip
    """Write vectors, parts [rows, WIDTH] float32, where pool_ptr and params_ptr [rows] point.

    Returns the parts as a reader will find them, float32. `mask` [rows]: which rows are written.
    """
    inside = words < D * BITS // 16
    pointers = pool_ptr[:, None] + words
    if BITS == 16:
        a = a.to(pool_ptr.dtype.element_ty)
        tl.store(pointers, a, mask=mask[:, None] & inside)
        return a.to(tl.float32), b, c, d
    else:
        if STATIC:
            word = tl.load(params_ptr, mask=mask, other=0)
        else:
            word = _measured(a, b, c, d, inside, BITS)
            tl.store(params_ptr, word, mask=mask)
        scale, zero = unpack_params(word)
        a = _quantized(a, scale, zero, BITS)
        b = _quantized(b, scale, zero, BITS)
        both = a + 256.0 * b
        if BITS == 4:
            c = _quantized(c, scale, zero, BITS)
            d = _quantized(d, scale, zero, BITS)
            both += 16.0 * c + 4096.0 * d
        both = both.to(tl.int32).to(tl.int16)
        tl.store(pointers, both, mask=mask[:, None] & inside)
        # Columns past the vector's end must not count in a sum.
        scale = tl.where(inside, scale[:, None], 0.0)
        zero = tl.where(inside, zero[:, None], 0.0)
        a = a * scale + zero
        b = b * scale + zero
        if BITS == 4:
            c = c * scale + zero
            d = d * scale + zero
        return a, b, c, d


@triton.jit
def tile_blocks(table_ptr, first, limit, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Blocks of the BLOCK_N positions from `first` on, one number if a tile lies in one block.

    Positions from `limit` on are in block 0. Loops ask for the next tile's blocks a turn ahead: in
    the turn itself, Triton would spend its pipeline's stages on this load, not on the tile's.
    """
    if BLOCK_SIZE % BLOCK_N == 0:
        return tl.load(table_ptr + first // BLOCK_SIZE, mask=first < limit, other=0)
    else:
        positions = first + tl.arange(0, BLOCK_N)
        return tl.load(table_ptr + positions // BLOCK_SIZE, mask=positions < limit, other=0)


@triton.jit
def tile_slots(blocks, first, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """(origin, rows): slot origin + rows[i] holds position first + i, i < BLOCK_N."""
    offsets = tl.arange(0, BLOCK_N)
    blocks = blocks.to(tl.int64)
    if BLOCK_SIZE % BLOCK_N == 0:
        return blocks * BLOCK_SIZE + first % BLOCK_SIZE, offsets
    else:
        return 0, blocks * BLOCK_SIZE + (first + offsets) % BLOCK_SIZE


@triton.jit
def widened_bytes(x, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """(low, high) bytes of 16-bit words as numbers of DTYPE.

    A conversion instruction takes as long as several others; a byte under 0x64 is already the
    float16 1024 + byte.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 hi, k, t0, t1;
            mov.b32 hi, 0x64646464;
            mov.b32 k, 0x64006400;
            prmt.b32 t0, $2, hi, 0x4240;
            prmt.b32 t1, $2, hi, 0x4341;
            sub.f16x2 $0, t0, k;
            sub.f16x2 $1, t1, k;
            }""",
            "=r,=r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return (x & 0xFF).to(DTYPE), ((x >> 8) & 0xFF).to(DTYPE)


@triton.jit
def widened_nibbles(x, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Nibbles 0, 2, 1, 3 of 16-bit words as numbers of DTYPE; 0x64h0 is 1024 + 16 h."""
    if PTX:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 hi, k, s, m, t0, t1, a, b, c, d;
            mov.b32 hi, 0x64646464;
            mov.b32 k, 0x64006400;
            mov.b32 s, 0x2c002c00;
            mov.b32 m, 0xd400d400;
            prmt.b32 t0, $4, hi, 0x4240;
            prmt.b32 t1, $4, hi, 0x4341;
            and.b32 a, t0, 0x640f640f;
            and.b32 b, t1, 0x640f640f;
            and.b32 c, t0, 0x64f064f0;
            and.b32 d, t1, 0x64f064f0;
            sub.f16x2 $0, a, k;
            sub.f16x2 $1, b, k;
            fma.rn.f16x2 $2, c, s, m;
            fma.rn.f16x2 $3, d, s, m;
            }""",
            "=r,=r,=r,=r,r", [x], dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        low, high = x & 0xFF, (x >> 8) & 0xFF
        return (
            (low & 15).to(DTYPE), (high & 15).to(DTYPE),
            (low >> 4).to(DTYPE), (high >> 4).to(DTYPE),
        )  # fmt: skip


@triton.jit
def load_tile(
    pool_ptr, rows, slot_stride, words, valid, D: tl.constexpr, BITS: tl.constexpr,
    DTYPE: tl.constexpr, PTX: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The parts [BLOCK_N, WIDTH] of a tile's vectors, as stored but widened to DTYPE.

    Rows that are not `valid` [BLOCK_N] are 0: what lies there may be anything, NaN too. Without
    MASKED all are valid.
    """
    pointers = pool_ptr + rows[:, None] * slot_stride + words
    mask = valid[:, None] if MASKED else words >= 0
    if words.shape[1] != D * BITS // 16:
        mask = mask & (words < D * BITS // 16)
    x = tl.load(pointers, mask=mask, other=0)
    b = 0.0
    c = 0.0
    d = 0.0
    if BITS == 16:
        a = x.to(DTYPE)
    elif BITS == 8:
        a, b = widened_bytes(x, DTYPE, PTX)
    else:
        a, b, c, d = widened_nibbles(x, DTYPE, PTX)
    return a, b, c, d


@triton.jit
def dot_keys(
    qa, qb, qc, qd, ka, kb, kc, kd, BITS: tl.constexpr, PRECISION: tl.constexpr
):
    """Products [BLOCK_M, BLOCK_N] of queries and keys in parts."""
    scores = tl.dot(qa, tl.trans(ka), input_precision=PRECISION)
    if BITS < 16:
        scores = tl.dot(qb, tl.trans(kb), scores, input_precision=PRECISION)
    if BITS == 4:
        scores = tl.dot(qc, tl.trans(kc), scores, input_precision=PRECISION)
        scores = tl.dot(qd, tl.trans(kd), scores, input_precision=PRECISION)
    return scores


def part_width(head_dim: int, bits: int) -> int:
    """Columns a part takes in a tile: what tl.dot needs at least is 16."""
    return max(16, next_power_of_2(head_dim * bits // 16))


def pool_words(pool: Tensor, bits: int) -> Tensor:
    """A pool as the kernels read it: quantized ones in 16-bit words, [K, N, D / 2 or D / 4]."""
    return pool if bits == 16 else pool.view(torch.int16)


def dot_dtype(q: Tensor, cache: KVCache) -> torch.dtype:
    """What the tensor cores multiply: whole numbers to 255 are exact in float16."""
    if q.dtype == torch.bfloat16 and not q.is_cuda:
        return torch.float32  # Triton's interpreter multiplies bfloat16's bits as whole numbers
    if cache.bits == 16:
        return cache.k.dtype
    return torch.float32 if q.dtype == torch.float32 else torch.float16


def packed_params(params: Tensor | None) -> Tensor | None:
    """(scale, zero) float16 [K, N, 2] as int32 [K, N]: read and written in one piece."""
    return None if params is None else params.view(torch.int32).squeeze(-1)


def check(q: Tensor, k: Tensor | None, cache: KVCache) -> None:
    """What the kernels assume of q [T, H, D], k [T, K, D] and the pools.

    Raises:
        ValueError: a shape, layout or number of bits that they do not serve.
    """
    _, num_heads, head_dim = q.shape
    kv_heads = cache.k.shape[0]
    if cache.bits not in (4, 8, 16):
        raise ValueError(f"KV of {cache.bits} bits; 4, 8 and 16 are known")
    if num_heads % kv_heads or num_heads // kv_heads > 64:
        raise ValueError(f"{num_heads} query heads over {kv_heads} KV heads")
    if head_dim % 8 or head_dim > 256:
        raise ValueError(f"head_dim {head_dim}, which is no multiple of 8 up to 256")
    if cache.k.shape != cache.v.shape or cache.k.stride() != cache.v.stride():
        raise ValueError("the pools of keys and values have different layouts")
    if k is not None and k.shape[1:] != (kv_heads, head_dim):
        raise ValueError(f"keys {tuple(k.shape)} for {kv_heads} KV heads of {head_dim}")
