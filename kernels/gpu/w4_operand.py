"""Pieces of the W4A16 kernel for Hopper: from packed words to wgmma's operand in registers.

As `w4_unpack`, in Gluon: each tensor says which lane and register has which element, and no
element changes its lane (`assert_trivial`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.gpu.w4_unpack import SCALE_BFLOAT16, SCALE_FLOAT16, UNPACK_BFLOAT16, UNPACK_FLOAT16


@gluon.constexpr_function
def words_layout(rows, words, warps):
    """Of words [rows, 4 (c), words (u)]: as the lanes of wgmma's operand A want them unpacked."""
    span = 16 * warps
    regs = [[0, 0, 1], [0, 0, 2], [8, 0, 0]] if words == 4 else [[0, 0, 1], [8, 0, 0]]
    while span < rows:
        regs.append([span, 0, 0])
        span *= 2
    warp_bases = []
    step = 16
    while step < 16 * warps:
        warp_bases.append([step, 0, 0])
        step *= 2
    lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(regs, lanes, warp_bases, [], [rows, 4, words])


@gluon.jit
def unpacked(words, low, high, scale, LAYOUT: gl.constexpr, BF16: gl.constexpr):
    """Words [ROWS, 4 (c), 2 (u)] as the operand [ROWS, 64], scaled."""
    if BF16:
        a, b, c, d = gl.inline_asm_elementwise(
            UNPACK_BFLOAT16,
            "=r,=r,=r,=r,r,r,r",
            [words, low, high],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
        multiply: gl.constexpr = SCALE_BFLOAT16
    else:
        a, b, c, d = gl.inline_asm_elementwise(
            UNPACK_FLOAT16,
            "=r,=r,=r,=r,r,r,r",
            [words, low, high],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
        multiply: gl.constexpr = SCALE_FLOAT16  # type: ignore[no-redef]
    a = gl.inline_asm_elementwise(multiply, "=r,r,r", [a, scale], gl.int32, True, 1)
    b = gl.inline_asm_elementwise(multiply, "=r,r,r", [b, scale], gl.int32, True, 1)
    c = gl.inline_asm_elementwise(multiply, "=r,r,r", [c, scale], gl.int32, True, 1)
    d = gl.inline_asm_elementwise(multiply, "=r,r,r", [d, scale], gl.int32, True, 1)
    ROWS: gl.constexpr = words.shape[0]
    pairs = gl.join(gl.join(a, c), gl.join(b, d))  # [ROWS, c, u, s, h]
    first = (pairs & 0xFFFF).to(gl.int16)
    second = ((pairs >> 16) & 0xFFFF).to(gl.int16)
    halves = gl.join(first, second)  # [ROWS, c, u, s, h, p]
    values = gl.reshape(gl.permute(halves, (0, 2, 3, 4, 1, 5)), (ROWS, 64))
    if BF16:
        typed = values.to(gl.bfloat16, bitcast=True)
    else:
        typed = values.to(gl.float16, bitcast=True)
    return gl.convert_layout(typed, LAYOUT, assert_trivial=True)


@gluon.jit
def halves_of(words, LAYOUT: gl.constexpr):
    """Words [ROWS, 4, 4] as the two [ROWS, 4, 2] of a tile's first and last 64 columns."""
    ROWS: gl.constexpr = words.shape[0]
    first, last = gl.split(gl.permute(gl.reshape(words, (ROWS, 4, 2, 2)), (0, 1, 3, 2)))
    return (
        gl.convert_layout(first, LAYOUT, assert_trivial=True),
        gl.convert_layout(last, LAYOUT, assert_trivial=True),
    )


@gluon.jit
def factors(scale_zero, BF16: gl.constexpr):
    """Offsets and doubled scale for the unpacking."""
    zero = (scale_zero >> 16) & 0xF
    if BF16:
        low = zero * 0x00010001 - 0x3CFF3D00
        high = low
        scale = (scale_zero & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
        bits = scale.to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    else:
        low = zero * 0x00010001 - 0x1BFF1C00
        high = zero * 0x00100010 - 0x2BFF2C00
        bits = scale_zero & 0xFFFF
    return low, high, bits | (bits << 16)
