"""W4A16 for two to eight tokens: as `w4_mma`, with x loaded 16 bytes a lane.

There a lane loads its part of operand B pair by pair, and with several tokens the first cache
serves their rows one after another. Here four neighbouring lanes load 16 bytes each and exchange
them. Programs may stay for many strips of rows (KEEP): then x is loaded once, into registers, and
the words of the next strip arrive while this one is multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.launch import release_successor, wait_for_predecessor
from kernels.gpu.w4_mma import multiply, total_of
from kernels.gpu.w4_unpack import offsets_of, unpack_pairs


@triton.constexpr_function
def _load_asm(once: bool, masked: bool, zeros: bool) -> str:
    """16 bytes; what is read once takes no room in the first cache.

    Not as constants (.nc): such loads the assembler would put off until after the barriers.
    """
    load = f"ld.global{'.L1::no_allocate' if once else ''}.v4.b32 {{$0, $1, $2, $3}}, [$4];"
    if not masked:
        return load
    nothing = "".join(f"mov.b32 ${i}, 0;\n" for i in range(4)) if zeros else ""
    return f"{{\n.reg .pred wanted;\nsetp.ne.b32 wanted, $5, 0;\n{nothing}@wanted {load}\n}}"


@triton.jit
def _load_words(pointers, wanted, ONCE: tl.constexpr, MASKED: tl.constexpr, ZEROS: tl.constexpr,
                ASM: tl.constexpr):  # fmt: skip
    """Four words for each lane; where not wanted (if MASKED), zeros if ZEROS, else anything.

    In the order of the program, as not pure: before the wait for the kernel before this one.
    """
    if ASM:
        first, second, third, fourth = tl.inline_asm_elementwise(
            _load_asm(ONCE, MASKED, ZEROS),
            "=&r,=&r,=&r,=&r,l,r",
            [pointers, wanted.to(tl.int32)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    else:
        first = tl.load(pointers, mask=wanted, other=0)
        second = tl.load(pointers + 1, mask=wanted, other=0)
        third = tl.load(pointers + 2, mask=wanted, other=0)
        fourth = tl.load(pointers + 3, mask=wanted, other=0)
    return first, second, third, fourth


@triton.jit
def _load_scale(pointers, ASM: tl.constexpr):
    if ASM:
        word = tl.inline_asm_elementwise(
            "ld.global.b32 $0, [$1];", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        word = tl.load(pointers)
    return word


# The 4 x 4 words of four neighbouring lanes, turned over: word i of lane c becomes word c of i.
TURN_OVER = tl.constexpr("""
{
.reg .pred odd, upper;
.reg .b32 bit, v0, v1, v2, v3, sent, got;
and.b32 bit, $8, 1;
setp.ne.b32 odd, bit, 0;
and.b32 bit, $8, 2;
setp.ne.b32 upper, bit, 0;
selp.b32 sent, $4, $5, odd;
shfl.sync.bfly.b32 got, sent, 1, 0x1f, 0xffffffff;
selp.b32 v0, got, $4, odd;
selp.b32 v1, $5, got, odd;
selp.b32 sent, $6, $7, odd;
shfl.sync.bfly.b32 got, sent, 1, 0x1f, 0xffffffff;
selp.b32 v2, got, $6, odd;
selp.b32 v3, $7, got, odd;
selp.b32 sent, v0, v2, upper;
shfl.sync.bfly.b32 got, sent, 2, 0x1f, 0xffffffff;
selp.b32 $0, got, v0, upper;
selp.b32 $2, v2, got, upper;
selp.b32 sent, v1, v3, upper;
shfl.sync.bfly.b32 got, sent, 2, 0x1f, 0xffffffff;
selp.b32 $1, got, v1, upper;
selp.b32 $3, v3, got, upper;
}
""")


@triton.jit
def _load_tokens(x_row, x_pairs: tl.constexpr, step: tl.constexpr, warp, r, c,
                 WARPS: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """A lane's sixteen pairs of a tile of x, of token r: pair 4u + i is column 16u + 4i + c."""
    all_there: tl.constexpr = (step + 1) * WARPS * 64 <= x_pairs
    loaded = ()
    for u in tl.static_range(4):
        column = (step * WARPS + warp) * 64 + 16 * u + c * 0 + r * 0
        wanted = column < x_pairs
        if ASM:
            place = x_row + column + 4 * c
            loaded = loaded + _load_words(place, wanted, False, not all_there, True, ASM)
        else:
            for i in tl.static_range(4):
                place = x_row + column + 4 * i + c
                loaded = loaded + (tl.load(place, mask=wanted, other=0),)  # type: ignore[assignment]
    if not ASM:
        return loaded
    pairs = ()
    for u in tl.static_range(4):
        turned = tl.inline_asm_elementwise(
            TURN_OVER,
            "=&r,=&r,=&r,=&r,r,r,r,r,r",
            loaded[4 * u : 4 * u + 4] + (c + warp * 0 + r * 0,),
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        pairs = pairs + (turned[0], turned[1], turned[2], turned[3])  # type: ignore[assignment]
    return pairs


@triton.jit
def _load_step(qweight, scale_zero, strip, step: tl.constexpr, there, warp, r, c, up_row, last_row,
               COLUMN_TILES: tl.constexpr, GROUPS: tl.constexpr, BLOCKS: tl.constexpr,
               WARPS: tl.constexpr, MASKED: tl.constexpr, GATED: tl.constexpr,
               ASM: tl.constexpr):  # fmt: skip
    """A lane's words of tile `step` of its warp: of each block of a strip, those of row r and their
    GROUPS (scale, zero), then those of row r + 8.

    If MASKED the strip may not be `there`, and its words are anything. A warp without a tile gets
    zeros, and another's scales.
    """
    WHOLE: tl.constexpr = (step + 1) * WARPS <= COLUMN_TILES
    OUT_ROWS: tl.constexpr = 8 if GATED else 16  # of a block
    wanted = (warp + r + c) >= 0
    if MASKED:
        wanted = wanted & there
    scale_tile = step * WARPS
    if not WHOLE:
        wanted = wanted & (step * WARPS + warp < COLUMN_TILES)
        scale_tile = tl.minimum(step * WARPS + warp, COLUMN_TILES - 1) - warp
    loaded = ()
    for part in tl.static_range(2 * BLOCKS):
        second = up_row if GATED else 8
        row = strip * (OUT_ROWS * BLOCKS) + (part // 2) * OUT_ROWS + (part % 2) * second + r
        row = tl.minimum(row, last_row) + c * 0
        # The constant part last: it then is one in the instruction.
        tile = (row // 64) * COLUMN_TILES + warp
        place = qweight + tile * 1024 + (row % 64) * 16 + 4 * c + step * (WARPS * 1024)
        loaded = loaded + _load_words(place, wanted, True, MASKED or not WHOLE, not WHOLE, ASM)
        place = scale_zero + tile * (64 * GROUPS) + row % 64 + scale_tile * (64 * GROUPS)
        for group in tl.static_range(GROUPS):
            loaded = loaded + (_load_scale(place + 64 * group, ASM),)
    return loaded


@triton.jit
def _part(values, i: tl.constexpr, SIZE: tl.constexpr):
    """The i-th `SIZE` of some values."""
    return values[i * SIZE : (i + 1) * SIZE]


@triton.jit
def _unpack(part, GROUPS: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr):
    """The 16 pairs of a row's four words, and the words' scales."""
    pairs = ()
    scales = ()
    for u in tl.static_range(4):
        scale = part[4 + u * GROUPS // 4]
        low, high = offsets_of(scale, BF16)
        pairs = pairs + unpack_pairs(part[u], low, high, BF16, ASM)
        scales = scales + (scale,)  # type: ignore[assignment]
    return pairs, scales


@triton.jit(do_not_specialize=["tokens", "strips"])
def w4_wide_kernel(
    x,  # int32: pairs; rows begin on 16 bytes
    qweight,
    scale_zero,
    bias,
    out,
    tokens,
    x_stride,  # pairs
    out_features,  # of the result
    up_row,  # first row of the second half if GATED
    last_row,  # of the weight, padding included
    strips,  # of BLOCKS blocks; a program has every num_programs(0)-th
    x_pairs: tl.constexpr,  # in_features / 2
    COLUMN_TILES: tl.constexpr,
    GROUPS: tl.constexpr,  # of a tile
    BLOCKS: tl.constexpr,  # of 16 rows of the weight
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,  # tiles a warp loads before it uses the first
    KEEP: tl.constexpr,  # x stays in registers: 16 for each tile of a warp
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    BF16: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    # Every tensor has this shape, one element a lane: see w4_mma.
    warp = tl.arange(0, WARPS)[:, None, None]
    r = tl.arange(0, 8)[None, :, None]
    c = tl.arange(0, 4)[None, None, :]
    STEPS: tl.constexpr = (COLUMN_TILES + WARPS - 1) // WARPS
    DEPTH: tl.constexpr = min(AHEAD, STEPS)
    PART: tl.constexpr = 4 + GROUPS  # words of a row and of its scales
    OUT_ROWS: tl.constexpr = 8 if GATED else 16  # of a block

    program = tl.program_id(0)
    programs = tl.num_programs(0)
    ring = ()
    for i in tl.static_range(DEPTH):
        ring = ring + _load_step(
            qweight, scale_zero, program, i, True, warp, r, c, up_row, last_row, COLUMN_TILES,
            GROUPS, BLOCKS, WARPS, False, GATED, ASM,
        )  # fmt: skip
    release_successor(PDL)
    wait_for_predecessor(PDL)

    first_token = tl.program_id(1) * 8
    # Beyond the last token that one again.
    token = tl.minimum(first_token + r, tokens - 1)
    x_row = x + token.to(tl.int64) * x_stride
    kept = ()
    if KEEP:
        for i in tl.static_range(STEPS):
            kept = kept + _load_tokens(x_row, x_pairs, i, warp, r, c, WARPS, ASM)
    lane_row = tl.arange(0, 8)[:, None]
    lane = tl.arange(0, 4)[None, :]
    for strip in range(program, strips, programs):
        accs = ()
        for _block in tl.static_range(BLOCKS * 4):
            accs = accs + (tl.zeros([WARPS, 8, 4], dtype=tl.float32),)  # type: ignore[assignment]
        if not KEEP:
            following = _load_tokens(x_row, x_pairs, 0, warp, r, c, WARPS, ASM)
        for i in tl.static_range(STEPS):
            if KEEP:
                xs = _part(kept, i, 16)
            else:
                xs = following
                if i + 1 < STEPS:
                    following = _load_tokens(x_row, x_pairs, i + 1, warp, r, c, WARPS, ASM)
            sums = ()
            for block in tl.static_range(BLOCKS):
                low, low_scales = _unpack(_part(ring, 2 * block, PART), GROUPS, BF16, ASM)
                high, high_scales = _unpack(_part(ring, 2 * block + 1, PART), GROUPS, BF16, ASM)
                sums = sums + multiply(
                    low, high, xs, low_scales, high_scales, _part(accs, block, 4), GROUPS, BF16, ASM
                )
            accs = sums
            # After its words are used: their registers take the next ones.
            ring = ring[2 * BLOCKS * PART :]  # type: ignore[assignment]
            if i + DEPTH < STEPS:
                ring = ring + _load_step(
                    qweight, scale_zero, strip, i + DEPTH, True, warp, r, c, up_row, last_row,
                    COLUMN_TILES, GROUPS, BLOCKS, WARPS, False, GATED, ASM,
                )  # fmt: skip
            else:
                then = strip + programs
                ring = ring + _load_step(
                    qweight, scale_zero, then, i + DEPTH - STEPS, then < strips, warp, r, c,
                    up_row, last_row, COLUMN_TILES, GROUPS, BLOCKS, WARPS, True, GATED, ASM,
                )  # fmt: skip

        for block in tl.static_range(BLOCKS):
            values = total_of(accs, 4 * block)
            for i in tl.static_range(2 if GATED else 4):
                row = (strip * BLOCKS + block) * OUT_ROWS + lane_row + 8 * (i // 2)
                column = first_token + 2 * lane + i % 2
                value = values[i]
                if GATED:
                    value = value / (1.0 + tl.exp(-value)) * values[i + 2]
                if BIAS:
                    added = tl.load(bias + row, mask=row < out_features, other=0.0)
                    value += added.to(tl.float32)
                tl.store(
                    out + column.to(tl.int64) * out_features + row,
                    value.to(out.dtype.element_ty),
                    mask=(row < out_features) & (column < tokens),
                )
