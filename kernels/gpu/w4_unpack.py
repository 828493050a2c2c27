"""Pieces of the W4A16 kernels: from packed words to pairs of numbers a tensor core takes.

A pair is an int32 with two neighbouring columns, the even one in its low half, both of x's type.
Of the eight nibbles of a word (see `kernels.packing`), nibbles i and i + 4 are such a pair. A
nibble is or-ed into the mantissa of 1024 (float16) or 128 (bfloat16), which makes it 1024 + q or
128 + q without a conversion; subtracting 1024 + zero then gives q - zero exactly. Two nibbles a
time: 9 instructions a word in float16, 11 in bfloat16. Inline PTX does not run in Triton's
interpreter, so each piece of it has a twin in plain Triton, chosen by ASM.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Nibbles 1 and 3 stay where they are, four bits up: 1024 + 16 q; the factor 1/16 brings them down.
UNPACK_FLOAT16 = tl.constexpr("""
{
.reg .b32 high, t0, t1, t2, t3, sixteenth;
mov.b32 sixteenth, 0x2C002C00;
shr.u32 high, $4, 8;
lop3.b32 t0, $4, 0x000f000f, 0x64006400, 0xEA;
lop3.b32 t1, $4, 0x00f000f0, 0x64006400, 0xEA;
lop3.b32 t2, high, 0x000f000f, 0x64006400, 0xEA;
lop3.b32 t3, high, 0x00f000f0, 0x64006400, 0xEA;
add.rn.f16x2 $0, t0, $5;
fma.rn.f16x2 $1, t1, sixteenth, $6;
add.rn.f16x2 $2, t2, $5;
fma.rn.f16x2 $3, t3, sixteenth, $6;
}
""")
# bfloat16 has room for four bits only, so every pair is shifted down; an addition of this type
# does not exist below sm_90, so it is a multiply-add by 1.
UNPACK_BFLOAT16 = tl.constexpr("""
{
.reg .b32 u1, u2, u3, t0, t1, t2, t3, one;
mov.b32 one, 0x3F803F80;
shr.u32 u1, $4, 4;
shr.u32 u2, $4, 8;
shr.u32 u3, $4, 12;
lop3.b32 t0, $4, 0x000f000f, 0x43004300, 0xEA;
lop3.b32 t1, u1, 0x000f000f, 0x43004300, 0xEA;
lop3.b32 t2, u2, 0x000f000f, 0x43004300, 0xEA;
lop3.b32 t3, u3, 0x000f000f, 0x43004300, 0xEA;
fma.rn.bf16x2 $0, t0, one, $5;
fma.rn.bf16x2 $1, t1, one, $5;
fma.rn.bf16x2 $2, t2, one, $5;
fma.rn.bf16x2 $3, t3, one, $5;
}
""")


@triton.jit
def offsets_of(scale_zero, BF16: tl.constexpr):
    """-(1024 + zero) and -(64 + zero) twice in an int32 (bfloat16: -(128 + zero) in both)."""
    zero = (scale_zero >> 16) & 0xF  # float16 counts in steps of 1 from 1024 on
    if BF16:
        low = zero * 0x00010001 - 0x3CFF3D00  # 0xC300C300 as int32
        high = low
    else:
        low = zero * 0x00010001 - 0x1BFF1C00  # 0xE400E400
        high = zero * 0x00100010 - 0x2BFF2C00  # 0xD400D400: steps of 1/16 from 64 on
    return low, high


@triton.jit
def scale_of(scale_zero):
    """The scale as float32."""
    return (scale_zero & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def unpack_pairs(words, low, high, BF16: tl.constexpr, ASM: tl.constexpr):
    """Four pairs of q - zero for each word: nibbles (0, 4), (1, 5), (2, 6) and (3, 7)."""
    if ASM:
        if BF16:
            a, b, c, d = tl.inline_asm_elementwise(
                UNPACK_BFLOAT16,
                "=r,=r,=r,=r,r,r,r",
                [words, low, high],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                UNPACK_FLOAT16,
                "=r,=r,=r,=r,r,r,r",
                [words, low, high],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
    else:
        zero = low & 0xF
        a = _plain_pair(words, zero, 0, BF16)
        b = _plain_pair(words, zero, 4, BF16)
        c = _plain_pair(words, zero, 8, BF16)
        d = _plain_pair(words, zero, 12, BF16)
    return a, b, c, d


@triton.jit
def _plain_pair(words, zero, SHIFT: tl.constexpr, BF16: tl.constexpr):
    first = (((words >> SHIFT) & 0xF) - zero).to(tl.float32)
    second = (((words >> (SHIFT + 16)) & 0xF) - zero).to(tl.float32)
    return _bits(first, BF16) | (_bits(second, BF16) << 16)


@triton.jit
def _bits(value, BF16: tl.constexpr):
    """The 16 bits of a small whole number in x's type."""
    if BF16:
        bits = (value.to(tl.int32, bitcast=True) >> 16) & 0xFFFF
    else:
        bits = value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits


@triton.jit
def pair_values(pair, BF16: tl.constexpr):
    """Both numbers of a pair as float32."""
    if BF16:
        first = (pair << 16).to(tl.float32, bitcast=True)
        second = (pair & -65536).to(tl.float32, bitcast=True)
    else:
        first = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        second = ((pair >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return first, second


SCALE_FLOAT16 = tl.constexpr("mul.rn.f16x2 $0, $1, $2;")
SCALE_BFLOAT16 = tl.constexpr("""
{
.reg .b32 nought;
mov.b32 nought, 0x80008000;
fma.rn.bf16x2 $0, $1, $2, nought;
}
""")


@triton.jit
def scaled_pair(pair, scale, BF16: tl.constexpr, ASM: tl.constexpr):
    """A pair times `scale` (float32, rounded to x's type first), each product rounded."""
    if ASM:
        if BF16:
            bits = scale.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            result = tl.inline_asm_elementwise(
                SCALE_BFLOAT16, "=r,r,r", [pair, bits | (bits << 16)], tl.int32, True, 1
            )
        else:
            bits = scale.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            result = tl.inline_asm_elementwise(
                SCALE_FLOAT16, "=r,r,r", [pair, bits | (bits << 16)], tl.int32, True, 1
            )
    else:
        first, second = pair_values(pair, BF16)
        result = _bits(first * scale, BF16) | (_bits(second * scale, BF16) << 16)
    return result


@triton.jit
def matrix_of(a, b, c, d, ROWS: tl.constexpr, BF16: tl.constexpr):
    """Pairs int32 [ROWS, 4 (c), 4 (u)] of `unpack_pairs` as the tile [ROWS, 128] of x's type."""
    # s and h, from 0 to 1, number the pairs; then p the halves of one: column 32u+16s+8h+2c+p.
    pairs = tl.join(tl.join(a, c), tl.join(b, d))  # [ROWS, c, u, s, h]
    first = (pairs & 0xFFFF).to(tl.int16)
    second = ((pairs >> 16) & 0xFFFF).to(tl.int16)
    halves = tl.join(first, second)  # [ROWS, c, u, s, h, p]
    values = tl.reshape(tl.permute(halves, (0, 2, 3, 4, 1, 5)), (ROWS, 128))
    if BF16:
        tile = values.to(tl.bfloat16, bitcast=True)
    else:
        tile = values.to(tl.float16, bitcast=True)
    return tile
