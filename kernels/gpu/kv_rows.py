"""Tiles of KV as `kernels.gpu.decode_rows` reads them: a vector in the registers of a few lanes.

A tile is [LANES, REPEATS] tokens, [LANES, REPEATS, WORDS] of int32 as stored; widened, its last
dimension is that of the elements, in their order. 16 and 8 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_blocks(
    table, tile, limit, REPEATS: tl.constexpr, LANES: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """The block numbers of a tile's tokens: one if a block holds tiles, else [LANES, REPEATS]."""
    first = tile * (REPEATS * LANES)
    if BLOCK_SIZE % (REPEATS * LANES) == 0:
        return tl.load(table + first // BLOCK_SIZE, mask=first < limit, other=0)
    else:
        at = first + tl.arange(0, LANES)[:, None] * REPEATS + tl.arange(0, REPEATS)[None, :]
        return tl.load(table + at // BLOCK_SIZE, mask=at < limit, other=0)


@triton.jit
def row_slots(
    tile, start, limit, blocks, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    REPEATS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """(slots, which are seen) of a tile's tokens, [LANES, REPEATS]."""
    first = tile * (REPEATS * LANES)
    rows = tl.arange(0, LANES)[:, None] * REPEATS + tl.arange(0, REPEATS)[None, :]
    seen = first + rows < limit
    if WINDOW > 0:
        seen = seen & (first + rows >= start)
    if BLOCK_SIZE % (REPEATS * LANES) == 0:
        slots = blocks.to(tl.int64) * BLOCK_SIZE + first % BLOCK_SIZE + rows
    else:
        slots = blocks.to(tl.int64) * BLOCK_SIZE + (first + rows) % BLOCK_SIZE
    return slots, seen


@triton.jit
def load_rows(
    head, params, slots, seen, slot_stride, params_stride, words, D: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Vectors as stored, int32 [LANES, REPEATS, WORDS], and their parameters."""
    mask = seen[:, :, None]
    if words.shape[0] != D * BITS // 32:
        mask = mask & (words < D * BITS // 32)[None, None, :]
    at = (slots * slot_stride)[:, :, None] + words[None, None, :]
    x = tl.load(head + at, mask=mask, other=0)
    param = 0
    if BITS < 16:
        # Without a mask, so that a lane's are read in one piece.
        param = tl.load(params + slots * params_stride)
    return x, param


@triton.jit
def widened_rows(x, BITS: tl.constexpr, BF16: tl.constexpr, PTX: tl.constexpr):
    """The elements of int32 [.., .., WORDS] as float32, those of 8 bits 1024 too large.

    1024 + q is what a byte becomes as float16 by setting the bits beside it. Taken off once a sum,
    not once an element, it costs nothing; float32 has room for both.
    """
    if BITS == 16:
        if BF16:
            low = (x << 16).to(tl.float32, bitcast=True)
            high = (x & -65536).to(tl.float32, bitcast=True)
        elif PTX:
            low, high = tl.inline_asm_elementwise(
                "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }",
                "=f,=f,r", [x], dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
            )  # fmt: skip
        else:
            low = (x & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
            high = ((x >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
            high = high.to(tl.float32)
        return tl.reshape(tl.join(low, high), (x.shape[0], x.shape[1], 2 * x.shape[2]))
    else:
        if PTX:
            first, second, third, fourth = tl.inline_asm_elementwise(
                """{
                .reg .b32 t0, t1, m; .reg .b16 i, j, k, l;
                mov.b32 m, 0x64646464;
                prmt.b32 t0, $4, m, 0x4140;
                prmt.b32 t1, $4, m, 0x4342;
                mov.b32 {i, j}, t0; mov.b32 {k, l}, t1;
                cvt.f32.f16 $0, i; cvt.f32.f16 $1, j; cvt.f32.f16 $2, k; cvt.f32.f16 $3, l;
                }""",
                "=f,=f,=f,=f,r", [x], dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=True, pack=1,
            )  # fmt: skip
        else:
            first = (x & 0xFF).to(tl.float32) + 1024.0
            second = ((x >> 8) & 0xFF).to(tl.float32) + 1024.0
            third = ((x >> 16) & 0xFF).to(tl.float32) + 1024.0
            fourth = ((x >> 24) & 0xFF).to(tl.float32) + 1024.0
        both = tl.join(tl.join(first, third), tl.join(second, fourth))
        return tl.reshape(both, (x.shape[0], x.shape[1], 4 * x.shape[2]))


@triton.jit
def whole_row(a, b, BITS: tl.constexpr):
    """Parts of `kv_tiles` as one row [1, elements]."""
    return a if BITS == 16 else tl.interleave(a, b)


@triton.jit
def store_row(out, a, D: tl.constexpr):
    """Write the first D elements of a row [1, elements]."""
    columns = tl.arange(0, a.shape[1])[None, :]
    tl.store(out + columns, a.to(out.dtype.element_ty), mask=columns < D)
