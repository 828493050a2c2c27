"""W4A16 for few tokens: weights go from memory to registers to the tensor cores, nothing between.

A program has 16 rows (or a few blocks of 16) of the weight and all its columns, so that nothing is
left to add up across programs. Its warps take the tiles of 128 columns in turn. A lane loads 16
bytes of a row: with the packing of `kernels.packing` these are, once unpacked, exactly its part of
the operand A of mma.m16n8k16 (lane 4r + c has rows r and r + 8, columns 2c, 2c + 1, 2c + 8 and
2c + 9), so no value passes through shared memory. x is operand B, 8 tokens wide; with one token
all eight columns are that one, which costs nothing.

If the product is gated, a block has 8 rows of the gate and, as rows r + 8, those 8 of up: what the
instruction leaves a lane is then both halves of its results.

The loads of a warp's first tiles are in flight before the kernel before this one has ended.
The sum's order depends on WARPS only, never on how many tokens or rows a program has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.launch import release_successor, wait_for_predecessor
from kernels.gpu.w4_unpack import offsets_of, pair_values, scale_of, unpack_pairs


@triton.constexpr_function
def _mma_asm(groups: int, bf16: bool) -> str:
    """Eight mma over 128 columns of 16 rows; each group's sum is scaled and added to a result.

    Operands: $0 to $3 results; from $4 the pairs of rows r (a word's four side by side, words in
    turn), from $20 those of rows r + 8, from $36 those of x; from $52 and $56 the scales (low
    half) of both rows for each word; from $60 what the results are added to.
    """
    kind = "bf16" if bf16 else "f16"
    lines = [
        "{",
        ".reg .f32 d0, d1, d2, d3, nought, s0, s1;",
        ".reg .b16 low, high;",
        "mov.f32 nought, 0f00000000;",
    ]
    per_group = 4 // groups
    for u in range(4):
        first = u % per_group == 0
        for s in range(2):
            pair = 4 * u + 2 * s
            a = [f"${base + pair + h}" for h in range(2) for base in (4, 20)]
            b = [f"${36 + pair + h}" for h in range(2)]
            c = "nought, nought, nought, nought" if first and s == 0 else "d0, d1, d2, d3"
            lines.append(
                f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{d0, d1, d2, d3}}, "
                f"{{{', '.join(a)}}}, {{{', '.join(b)}}}, {{{c}}};"
            )
        if u % per_group == per_group - 1:
            base = 60 if u < per_group else 0
            lines += [
                f"mov.b32 {{low, high}}, ${52 + u};",
                "cvt.f32.f16 s0, low;",
                f"mov.b32 {{low, high}}, ${56 + u};",
                "cvt.f32.f16 s1, low;",
            ]
            lines += [f"fma.rn.f32 ${i}, d{i}, s{i // 2}, ${base + i};" for i in range(4)]
    return "\n".join([*lines, "}"])


# Results are written before the last of the inputs is read: "&".
MMA_CONSTRAINTS = tl.constexpr(",".join(["=&f"] * 4 + ["r"] * 56 + ["f"] * 4))
LOAD_WORDS = tl.constexpr("""
{
.reg .pred wanted;
setp.ne.b32 wanted, $5, 0;
mov.b32 $0, 0;
mov.b32 $1, 0;
mov.b32 $2, 0;
mov.b32 $3, 0;
@wanted ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];
}
""")


@triton.jit
def _load_words(pointers, wanted, ASM: tl.constexpr):
    """A row's four words for each lane, zeros where not wanted.

    In the order of the program, as not pure: before the wait for the kernel before this one.
    """
    if ASM:
        a, b, c, d = tl.inline_asm_elementwise(
            LOAD_WORDS,
            "=&r,=&r,=&r,=&r,l,r",
            [pointers, wanted.to(tl.int32)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    else:
        a = tl.load(pointers, mask=wanted, other=0)
        b = tl.load(pointers + 1, mask=wanted, other=0)
        c = tl.load(pointers + 2, mask=wanted, other=0)
        d = tl.load(pointers + 3, mask=wanted, other=0)
    return a, b, c, d


LOAD_PAIR = tl.constexpr("""
{
.reg .pred wanted;
setp.ne.b32 wanted, $2, 0;
mov.b32 $0, 0;
@wanted ld.global.b32 $0, [$1];
}
""")


@triton.jit
def _load_pair(pointers, wanted, ALL: tl.constexpr, ASM: tl.constexpr):
    """A pair of x for each lane, after the wait for who wrote it; zero where not wanted."""
    if ASM:
        if ALL:
            pair = tl.inline_asm_elementwise(
                "ld.global.b32 $0, [$1];", "=r,l", [pointers], tl.int32, is_pure=False, pack=1
            )
        else:
            pair = tl.inline_asm_elementwise(
                LOAD_PAIR,
                "=&r,l,r",
                [pointers, wanted.to(tl.int32)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
    else:
        pair = tl.load(pointers, mask=wanted, other=0)
    return pair


@triton.jit
def _load_scale(pointers, ASM: tl.constexpr):
    if ASM:
        word = tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        word = tl.load(pointers)
    return word


@triton.jit
def _load_scales(places, warp, step, COLUMN_TILES: tl.constexpr, GROUPS: tl.constexpr,
                 WARPS: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """A row's (scale, zero) for each of its four words; groups lie 64 apart.

    A warp without a tile left reads some scale again; its words and its x are zero.
    """
    tile = step * WARPS
    if (step + 1) * WARPS > COLUMN_TILES:
        tile = tl.minimum(tile + warp, COLUMN_TILES - 1) - warp
    pointers = places + tile * (64 * GROUPS)
    first = _load_scale(pointers, ASM)
    if GROUPS == 1:
        words = (first, first, first, first)
    elif GROUPS == 2:
        second = _load_scale(pointers + 64, ASM)
        words = (first, first, second, second)
    else:
        words = (
            first,
            _load_scale(pointers + 64, ASM),
            _load_scale(pointers + 128, ASM),
            _load_scale(pointers + 192, ASM),
        )
    return words


@triton.jit
def _load_tokens(x, x_stride, x_pairs: tl.constexpr, tokens, first_token, step: tl.constexpr,
                 warp, r, c, WARPS: tl.constexpr, TOKEN_TILES: tl.constexpr,
                 ASM: tl.constexpr):  # fmt: skip
    """Sixteen pairs a lane for each eight tokens; beyond the last token that one again."""
    always = (warp + r + c) >= 0
    xs = ()
    for t in tl.static_range(TOKEN_TILES):
        token = tl.minimum(first_token + 8 * t + r, tokens - 1)
        row_place = x + token.to(tl.int64) * x_stride
        for pair in tl.static_range(16):
            column = (step * WARPS + warp) * 64 + pair * 4 + c
            wanted = always & (column < x_pairs)
            loaded = _load_pair(row_place + column, wanted, (step + 1) * WARPS * 64 <= x_pairs, ASM)
            xs = xs + (loaded,)  # type: ignore[assignment]
    return xs


@triton.jit
def _unpack(ring, scales, at: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr):
    """The 16 pairs of a row's four words, `at` of the ring and on, and the words' scales."""
    low, high = offsets_of(scales[at], BF16)
    p0 = unpack_pairs(ring[at], low, high, BF16, ASM)
    low, high = offsets_of(scales[at + 1], BF16)
    p1 = unpack_pairs(ring[at + 1], low, high, BF16, ASM)
    low, high = offsets_of(scales[at + 2], BF16)
    p2 = unpack_pairs(ring[at + 2], low, high, BF16, ASM)
    low, high = offsets_of(scales[at + 3], BF16)
    p3 = unpack_pairs(ring[at + 3], low, high, BF16, ASM)
    return p0 + p1 + p2 + p3, scales[at : at + 4]


@triton.jit
def multiply(low, high, x, scales_low, scales_high, acc, GROUPS: tl.constexpr,
              BF16: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """acc plus the product of 16 rows with 8 tokens over 128 columns; all tensors [WARPS, 8, 4].

    low, high: pairs of rows r and r + 8; x: pairs of token r. Result i is that of row
    r + 8 * (i // 2) and token 2c + i % 2: that is how the instruction leaves them.
    """
    if ASM:
        a, b, c, d = tl.inline_asm_elementwise(
            _mma_asm(GROUPS, BF16),
            MMA_CONSTRAINTS,
            low + high + x + scales_low + scales_high + acc,
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        a, b = _plain_product(low, x, scales_low, BF16)
        c, d = _plain_product(high, x, scales_high, BF16)
        a, b, c, d = a + acc[0], b + acc[1], c + acc[2], d + acc[3]
    return a, b, c, d


@triton.jit
def _plain_product(weights, x, scales, BF16: tl.constexpr):
    """The product [WARPS, 8 rows, 8 tokens] as even and odd tokens."""
    WARPS: tl.constexpr = scales[0].shape[0]
    total = tl.zeros([WARPS, 8, 8], dtype=tl.float32)
    for i in tl.static_range(16):
        w_first, w_second = pair_values(weights[i], BF16)
        x_first, x_second = pair_values(x[i], BF16)
        scale = scale_of(scales[i // 4])
        total += tl.sum((w_first * scale)[:, :, None, :] * x_first[:, None, :, :], axis=3)
        total += tl.sum((w_second * scale)[:, :, None, :] * x_second[:, None, :, :], axis=3)
    even, odd = tl.split(tl.reshape(total, (WARPS, 8, 4, 2)))
    return even, odd


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def total_of(parts, first: tl.constexpr):
    """Four results [WARPS, 8, 4], each summed over the warps, in one pass: [8, 4].

    Nothing stands between them and the sum that could ask for another layout.
    """
    a, b, c, d = tl.reduce(
        (parts[first], parts[first + 1], parts[first + 2], parts[first + 3]), 0, _add4
    )
    return a, b, c, d


# By the bucket of rows only: a prompt of another length must not wait for a compilation.
@triton.jit(do_not_specialize=["tokens"])
def w4_mma_kernel(
    x,  # int32: pairs
    qweight,
    scale_zero,
    bias,
    out,
    tokens,
    x_stride,  # pairs
    out_features,  # of the result
    up_row,  # first row of the second half if GATED
    last_row,  # of the weight, padding included
    x_pairs: tl.constexpr,  # in_features / 2
    COLUMN_TILES: tl.constexpr,
    GROUPS: tl.constexpr,  # of a tile
    BLOCKS: tl.constexpr,  # of 16 rows of the weight
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,  # tiles a warp loads before it uses the first
    TOKENS: tl.constexpr,  # 8, 16, 32 ...
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    BF16: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    # Every tensor has this shape: one element a lane, lane 4r + c having element [warp, r, c]. That
    # is how Triton lays tensors out unless a tl.load or tl.store asks for another order (Triton 3.6
    # does for x), so there is none before the sums.
    warp = tl.arange(0, WARPS)[:, None, None]
    r = tl.arange(0, 8)[None, :, None]
    c = tl.arange(0, 4)[None, None, :]
    STEPS: tl.constexpr = (COLUMN_TILES + WARPS - 1) // WARPS
    PARTS: tl.constexpr = BLOCKS * 2  # rows r and r + 8 of each block
    OUT_ROWS: tl.constexpr = 8 if GATED else 16  # of a block

    base = tl.program_id(0) * (OUT_ROWS * BLOCKS)
    places = ()
    scale_places = ()
    for part in tl.static_range(PARTS):
        second = up_row if GATED else 8
        row = base + (part // 2) * OUT_ROWS + (part % 2) * second + r
        row = tl.minimum(row, last_row) + c * 0
        tile = (row // 64) * COLUMN_TILES + warp
        places = places + (qweight + tile * 1024 + (row % 64) * 16 + 4 * c,)  # type: ignore[assignment]
        scale_places = scale_places + (scale_zero + tile * (64 * GROUPS) + row % 64,)  # type: ignore[assignment]

    always = (warp + r + c) >= 0
    ring = ()
    scales = ()
    for i in tl.static_range(min(AHEAD, STEPS)):
        wanted = always if (i + 1) * WARPS <= COLUMN_TILES else always & (
            i * WARPS + warp < COLUMN_TILES
        )
        for part in tl.static_range(PARTS):
            ring = ring + _load_words(places[part] + i * (WARPS * 1024), wanted, ASM)
            scales = scales + _load_scales(
                scale_places[part], warp, i, COLUMN_TILES, GROUPS, WARPS, ASM
            )
    release_successor(PDL)
    wait_for_predecessor(PDL)

    first_token = tl.program_id(1) * TOKENS
    TOKEN_TILES: tl.constexpr = TOKENS // 8
    accs = ()
    for _ in tl.static_range(BLOCKS * TOKEN_TILES * 4):
        accs = accs + (tl.zeros([WARPS, 8, 4], dtype=tl.float32),)  # type: ignore[assignment]
    following = _load_tokens(
        x, x_stride, x_pairs, tokens, first_token, 0, warp, r, c, WARPS, TOKEN_TILES, ASM
    )
    for i in tl.static_range(STEPS):
        if i + AHEAD < STEPS:
            wanted = always if (i + AHEAD + 1) * WARPS <= COLUMN_TILES else always & (
                (i + AHEAD) * WARPS + warp < COLUMN_TILES
            )
            for part in tl.static_range(PARTS):
                ring = ring + _load_words(places[part] + (i + AHEAD) * (WARPS * 1024), wanted, ASM)
                scales = scales + _load_scales(
                    scale_places[part], warp, i + AHEAD, COLUMN_TILES, GROUPS, WARPS, ASM
                )
        xs = following
        if i + 1 < STEPS:
            following = _load_tokens(
                x, x_stride, x_pairs, tokens, first_token, i + 1, warp, r, c, WARPS, TOKEN_TILES,
                ASM,
            )  # fmt: skip
        sums = ()
        for block in tl.static_range(BLOCKS):
            low, low_scales = _unpack(ring, scales, (i * PARTS + 2 * block) * 4, BF16, ASM)
            high, high_scales = _unpack(ring, scales, (i * PARTS + 2 * block + 1) * 4, BF16, ASM)
            for t in tl.static_range(TOKEN_TILES):
                sums = sums + multiply(
                    low,
                    high,
                    xs[16 * t : 16 * t + 16],
                    low_scales,
                    high_scales,
                    accs[4 * (block * TOKEN_TILES + t) : 4 * (block * TOKEN_TILES + t) + 4],
                    GROUPS,
                    BF16,
                    ASM,
                )
        accs = sums

    lane_row = tl.arange(0, 8)[:, None]
    lane = tl.arange(0, 4)[None, :]
    for block in tl.static_range(BLOCKS):
        for t in tl.static_range(TOKEN_TILES):
            values = total_of(accs, 4 * (block * TOKEN_TILES + t))
            for i in tl.static_range(2 if GATED else 4):
                row = base + block * OUT_ROWS + lane_row + 8 * (i // 2)
                token = first_token + 8 * t + 2 * lane + i % 2
                value = values[i]
                if GATED:
                    value = value / (1.0 + tl.exp(-value)) * values[i + 2]
                if BIAS:
                    added = tl.load(bias + row, mask=row < out_features, other=0.0)
                    value += added.to(tl.float32)
                tl.store(
                    out + token.to(tl.int64) * out_features + row,
                    value.to(out.dtype.element_ty),
                    mask=(row < out_features) & (token < tokens),
                )
