"""W4A16 for few tokens: weights go from memory to registers to the tensor cores, nothing between.

A program has 16 rows (or a few blocks of 16) of the weight and all its columns, so that nothing is
left to add up across programs. Its warps take the tiles of 128 columns in turn. A lane loads 16
bytes of a row: with the packing of `kernels.packing` these are, once unpacked, exactly its part of
the operand A of mma.m16n8k16 (lane 4r + c has rows r and r + 8, columns 2c, 2c + 1, 2c + 8 and
2c + 9), so no value passes through shared memory. x is operand B, 8 tokens wide; with one token
the other seven columns are zero, which costs nothing: the memory is what is waited for.

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

    Operands by fours (one for each u of the packing): $0 results; $4 the pairs (s, h) of rows r,
    $20 those of rows r + 8, $36 those of x; $52 and $56 scales (low half) of both rows; $60 what
    the results are added to.
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
            a = [f"${4 + 16 * half + 4 * (2 * s + h) + u}" for h in range(2) for half in range(2)]
            b = [f"${36 + 4 * (2 * s + h) + u}" for h in range(2)]
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


# Four results are written before the last of the inputs is read: "&".
MMA_CONSTRAINTS = tl.constexpr(",".join(["=&f"] * 4 + ["r"] * 56 + ["f"] * 4))

@triton.constexpr_function
def _scales_asm(groups: int) -> str:
    """Loads of what no kernel changes: one for each group of a tile, for four addresses."""
    per_group = 4 // groups
    return "\n".join(
        f"mov.b32 ${u}, ${u - u % per_group};"
        if u % per_group
        else f"ld.global.nc.b32 ${u}, [${4 + u}];"
        for u in range(4)
    )


@triton.jit
def _load_scales(pointers, GROUPS: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        # Through tl.load, these would ask for a layout of their own.
        words = tl.inline_asm_elementwise(
            _scales_asm(GROUPS),
            "=&r,=&r,=&r,=&r,l,l,l,l",
            [pointers],
            dtype=tl.int32,
            is_pure=True,
            pack=4,
        )
    else:
        words = tl.load(pointers)
    return words


@triton.jit
def _multiply(low, high, x, scales_low, scales_high, acc, GROUPS: tl.constexpr,
              BF16: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """acc plus the product of 16 rows with 8 tokens; all [WARPS, 8, 16].

    low, high: pairs of rows r and r + 8; x: pairs of token r. Of the results, element 4c + i is
    row r + 8 * (i // 2), token 2c + i % 2: that is how the instruction leaves them.
    """
    if ASM:
        result = tl.inline_asm_elementwise(
            _mma_asm(GROUPS, BF16),
            MMA_CONSTRAINTS,
            [
                low[0], low[1], low[2], low[3],
                high[0], high[1], high[2], high[3],
                x[0], x[1], x[2], x[3],
                scales_low, scales_high, acc,
            ],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )  # fmt: skip
    else:
        first = _plain_product(low, x, scales_low, BF16)
        second = _plain_product(high, x, scales_high, BF16)
        WARPS: tl.constexpr = acc.shape[0]
        shape: tl.constexpr = (WARPS, 8, 4, 2)
        both = tl.join(tl.reshape(first, shape), tl.reshape(second, shape))
        both = tl.permute(both, (0, 1, 2, 4, 3))
        result = acc + tl.reshape(both, (WARPS, 8, 16))
    return result


@triton.jit
def _plain_product(weights, x, scales, BF16: tl.constexpr):
    """[WARPS, 8 rows, 8 tokens]."""
    total = tl.zeros([scales.shape[0], 8, 8], dtype=tl.float32)
    for i in tl.static_range(4):
        w_first, w_second = pair_values(weights[i], BF16)
        x_first, x_second = pair_values(x[i], BF16)
        scale = scale_of(scales)
        total += tl.sum((w_first * scale)[:, :, None, :] * x_first[:, None, :, :], axis=3)
        total += tl.sum((w_second * scale)[:, :, None, :] * x_second[:, None, :, :], axis=3)
    return total


@triton.jit
def _load_words(words, tiles, columns: tl.constexpr, EVEN: tl.constexpr):
    """int32 [WARPS, 8, 16] of a warp's tile; read once, so they need not stay in a cache."""
    if EVEN:
        loaded = tl.load(words + tiles * 1024, eviction_policy="evict_first")
    else:
        loaded = tl.load(
            words + tiles * 1024, mask=tiles < columns, other=0, eviction_policy="evict_first"
        )
    return loaded


@triton.jit
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
    BLOCKS: tl.constexpr,  # of 16 rows
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,  # tiles a warp loads before it uses the first
    TOKENS: tl.constexpr,  # 8, 16, 32 ...
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    BF16: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    # Every load of a matrix has this shape, so that all have one layout: a lane has [.., r, 4c:].
    warp = tl.arange(0, WARPS)[:, None, None]
    r = tl.arange(0, 8)[None, :, None]
    word = tl.arange(0, 16)[None, None, :]
    STEPS: tl.constexpr = (COLUMN_TILES + WARPS - 1) // WARPS
    EVEN: tl.constexpr = COLUMN_TILES % WARPS == 0
    HALVES: tl.constexpr = 2 if GATED else 1
    PARTS: tl.constexpr = BLOCKS * HALVES * 2  # rows r and r + 8 of each block

    base = tl.program_id(0) * (16 * BLOCKS)
    places = ()
    scale_places = ()
    for part in tl.static_range(PARTS):
        row = base + (part // 2 % BLOCKS) * 16 + (part % 2) * 8 + r
        if part // 2 >= BLOCKS:
            row += up_row
        row = tl.minimum(row, last_row)
        tile = (row // 64) * COLUMN_TILES
        places = places + (qweight + tile * 1024 + (row % 64) * 16 + word,)
        group = (word % 4) // (4 // GROUPS)
        scale_places = scale_places + (scale_zero + (tile * GROUPS + group) * 64 + row % 64,)

    ring = ()
    for i in tl.static_range(min(AHEAD, STEPS)):
        for part in tl.static_range(PARTS):
            ring = ring + (_load_words(places[part], i * WARPS + warp, COLUMN_TILES, EVEN),)
    release_successor(PDL)
    wait_for_predecessor(PDL)

    first_token = tl.program_id(1) * TOKENS
    TOKEN_TILES: tl.constexpr = TOKENS // 8
    accs = ()
    for _ in tl.static_range(BLOCKS * HALVES * TOKEN_TILES):
        accs = accs + (tl.zeros([WARPS, 8, 16], dtype=tl.float32),)
    for i in tl.static_range(STEPS):
        tiles = i * WARPS + warp
        if i + AHEAD < STEPS:
            for part in tl.static_range(PARTS):
                following = (i + AHEAD) * WARPS + warp
                ring = ring + (_load_words(places[part], following, COLUMN_TILES, EVEN),)
        xs = ()
        for t in tl.static_range(TOKEN_TILES):
            token = first_token + 8 * t + r
            for pair in tl.static_range(4):
                column = tiles * 64 + (word % 4) * 16 + pair * 4 + word // 4
                mask = (token < tokens) & (column < x_pairs)
                xs = xs + (tl.load(x + token.to(tl.int64) * x_stride + column, mask, other=0),)
        clamped = tl.minimum(tiles, COLUMN_TILES - 1)
        sums = ()
        for block in tl.static_range(BLOCKS * HALVES):
            group = clamped * (64 * GROUPS)
            low_scales = _load_scales(scale_places[2 * block] + group, GROUPS, ASM)
            high_scales = _load_scales(scale_places[2 * block + 1] + group, GROUPS, ASM)
            first, second = offsets_of(low_scales, BF16)
            low = unpack_pairs(ring[i * PARTS + 2 * block], first, second, BF16, ASM)
            first, second = offsets_of(high_scales, BF16)
            high = unpack_pairs(
                ring[i * PARTS + 2 * block + 1], first, second, BF16, ASM
            )
            for t in tl.static_range(TOKEN_TILES):
                sums = sums + (
                    _multiply(
                        low,
                        high,
                        (xs[4 * t], xs[4 * t + 1], xs[4 * t + 2], xs[4 * t + 3]),
                        low_scales,
                        high_scales,
                        accs[block * TOKEN_TILES + t],
                        GROUPS,
                        BF16,
                        ASM,
                    ),
                )
        accs = sums

    lane_row = tl.arange(0, 8)[:, None]
    element = tl.arange(0, 16)[None, :]
    for block in tl.static_range(BLOCKS):
        row = base + block * 16 + lane_row + 8 * (element % 4 // 2)
        for t in tl.static_range(TOKEN_TILES):
            value = tl.sum(accs[block * TOKEN_TILES + t], axis=0)
            if GATED:
                up = tl.sum(accs[(BLOCKS + block) * TOKEN_TILES + t], axis=0)
                value = value / (1.0 + tl.exp(-value)) * up
            if BIAS:
                value += tl.load(bias + row, mask=row < out_features, other=0.0).to(tl.float32)
            token = first_token + 8 * t + 2 * (element // 4) + element % 2
            tl.store(
                out + token.to(tl.int64) * out_features + row,
                value.to(out.dtype.element_ty),
                mask=(row < out_features) & (token < tokens),
            )
