"""W4A16 for many tokens: Yᵀ = W Xᵀ on wgmma with W in registers, and unpacking for cuBLAS.

The weight is the first operand, so that its 64 rows fill the instruction whatever the number of
tokens is. Words arrive by asynchronous copies, in the order of the registers of that operand, and
are unpacked there: the unpacked weight never passes through shared memory.

Where the rows are too few to fill the chip, `splits` programs share a tile of the result, each with
a range of columns. Each writes its sums in float32; the last to arrive (an integer counter tells)
adds them in the order of the columns: the same bits every time, and no second launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.launch import release_successor, wait_for_predecessor
from kernels.gpu.w4_unpack import matrix_of, offsets_of, scale_of, scaled_pair, unpack_pairs

# Tiles of a program on their way to the L2 cache before the kernel before this one has ended.
PREFETCHED = tl.constexpr(6)


@triton.jit
def _prefetch(pointers):
    """Fetch the 64 bytes of each row of a tile; the result means nothing."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _tile_rows(first, up_row, last_row, ROWS: tl.constexpr, GATED: tl.constexpr):
    """The weight's rows of a tile: if GATED, half of them of the gate, half of up."""
    index = tl.arange(0, ROWS)
    if GATED:
        half: tl.constexpr = ROWS // 2
        row = first + index % half + (index // half) * up_row
    else:
        row = first + index
    return tl.minimum(row, last_row)


# By the bucket of rows only: a prompt of another length must not wait for a compilation.
@triton.jit(do_not_specialize=["tokens", "splits"])
def w4_dot_kernel(
    x,
    qweight,
    scale_zero,
    bias,
    out,
    partials,  # float32 [programs, ROWS, TOKENS] if SPLIT
    counters,  # int32, zero before and after
    tokens,
    x_stride,
    out_features,
    up_row,
    last_row,
    in_features,
    column_tiles,
    splits,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,  # splits > 1
    WHOLE_TILES: tl.constexpr,  # in_features is a multiple of 128
    SCALE_WEIGHTS: tl.constexpr,  # else the sums of a tile are scaled: one group a tile only
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    BF16: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    OUT_ROWS: tl.constexpr = ROWS // 2 if GATED else ROWS
    split = tl.program_id(0) % splits
    block = tl.program_id(0) // splits
    row = _tile_rows(block * OUT_ROWS, up_row, last_row, ROWS, GATED)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, 128)
    c = tl.arange(0, 4)[None, :, None]
    u = tl.arange(0, 4)[None, None, :]
    tile = (row // 64) * column_tiles
    words = qweight + (tile * 1024 + (row % 64) * 16)[:, None, None] + 4 * c + u
    # Of one group a tile, a row's scale; of more, one for each u.
    if GROUPS == 1:
        scale_place = scale_zero + tile * 64 + row % 64
    else:
        scale_place = (
            scale_zero
            + (tile * (GROUPS * 64) + row % 64)[:, None, None]
            + (u // (4 // GROUPS)) * 64
            + c * 0
        )
    x_place = x + token.to(tl.int64)[:, None] * x_stride + column[None, :]
    x_mask = (token < tokens)[:, None]
    per_split = (column_tiles + splits - 1) // splits
    start = split * per_split
    end = tl.minimum(start + per_split, column_tiles)
    if PDL:
        for i in tl.static_range(PREFETCHED):
            ahead = tl.minimum(start + i, column_tiles - 1)
            _prefetch(qweight + (tile + ahead) * 1024 + (row % 64) * 16)
    release_successor(PDL)
    wait_for_predecessor(PDL)

    acc = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
    for i in range(start, end):
        packed = tl.load(words + i * 1024)
        scales = tl.load(scale_place + i * (64 * GROUPS))
        if WHOLE_TILES:
            values = tl.load(x_place + i * 128, mask=x_mask, other=0.0)
        else:
            mask = x_mask & (i * 128 + column < in_features)[None, :]
            values = tl.load(x_place + i * 128, mask=mask, other=0.0)
        if GROUPS == 1:
            per_word = scales[:, None, None]
        else:
            per_word = scales
        low, high = offsets_of(per_word, BF16)
        p0, p1, p2, p3 = unpack_pairs(packed, low, high, BF16, ASM)
        if SCALE_WEIGHTS:
            scale = scale_of(per_word)
            p0 = scaled_pair(p0, scale, BF16, ASM)
            p1 = scaled_pair(p1, scale, BF16, ASM)
            p2 = scaled_pair(p2, scale, BF16, ASM)
            p3 = scaled_pair(p3, scale, BF16, ASM)
            acc = _dot(matrix_of(p0, p1, p2, p3, ROWS, BF16), values, acc, ASM)
        else:
            nothing = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
            product = _dot(matrix_of(p0, p1, p2, p3, ROWS, BF16), values, nothing, ASM)
            acc += product * scale_of(scales)[:, None]

    if not SPLIT:
        _store(acc, bias, out, block * OUT_ROWS, token, tokens, out_features, ROWS, GATED, BIAS)
    else:
        group = tl.program_id(1) * (tl.num_programs(0) // splits) + block
        index = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        place = partials + group.to(tl.int64) * (splits * ROWS * TOKENS) + index
        tl.store(place + split * (ROWS * TOKENS), acc)
        tl.debug_barrier()  # every thread's part is written before one thread says so
        arrived = tl.atomic_add(counters + group, 1, sem="acq_rel")
        if arrived == splits - 1:
            total = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
            for s in range(splits):
                total += tl.load(place + s * (ROWS * TOKENS), cache_modifier=".cg")
            tl.store(counters + group, 0)
            _store(
                total, bias, out, block * OUT_ROWS, token, tokens, out_features, ROWS, GATED, BIAS
            )


@triton.jit
def _dot(matrix, values, acc, ASM: tl.constexpr):
    """acc [ROWS, TOKENS] plus matrix [ROWS, 128] times the transpose of values [TOKENS, 128]."""
    if ASM:
        result = tl.dot(matrix, tl.trans(values), acc)
    else:  # the interpreter multiplies bfloat16 as if its bits were integers
        result = tl.dot(
            matrix.to(tl.float32), tl.trans(values.to(tl.float32)), acc, input_precision="ieee"
        )
    return result


@triton.jit
def _store(acc, bias, out, first, token, tokens, out_features, ROWS: tl.constexpr,
           GATED: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """Write the tile [ROWS, TOKENS] to out [T, out_features]; gate and up become one."""
    if GATED:
        half: tl.constexpr = ROWS // 2
        both = tl.permute(tl.reshape(acc, (2, half, token.shape[0])), (1, 2, 0))
        gate, up = tl.split(both)
        value = gate / (1.0 + tl.exp(-gate)) * up
        row = first + tl.arange(0, half)
    else:
        value = acc
        row = first + tl.arange(0, ROWS)
    if BIAS:
        added = tl.load(bias + row, mask=row < out_features, other=0.0)
        value += added.to(tl.float32)[:, None]
    mask = (row < out_features)[:, None] & (token < tokens)[None, :]
    place = out + token.to(tl.int64)[None, :] * out_features + row[:, None]
    tl.store(place, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def w4_dequantize_kernel(
    qweight,
    scale_zero,
    out,  # [rows, in_features]
    first_tile,
    rows,
    in_features,
    COLUMN_TILES: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BF16: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows first_tile * 64 on, as x's type: (q - zero) * scale, rounded once."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = (first_tile + index // 64) * COLUMN_TILES + tl.program_id(1)
    c = tl.arange(0, 4)[None, :, None]
    u = tl.arange(0, 4)[None, None, :]
    packed = tl.load(qweight + (tile * 1024 + (index % 64) * 16)[:, None, None] + 4 * c + u)
    group = u // (4 // GROUPS) + c * 0
    scales = tl.load(scale_zero + (tile * (GROUPS * 64) + index % 64)[:, None, None] + group * 64)
    low, high = offsets_of(scales, BF16)
    p0, p1, p2, p3 = unpack_pairs(packed, low, high, BF16, ASM)
    values = matrix_of(p0, p1, p2, p3, ROWS, BF16).to(tl.float32)
    scale = tl.permute(
        tl.broadcast_to(scale_of(scales)[:, :, :, None], (ROWS, 4, 4, 8)), (0, 2, 1, 3)
    )
    values *= tl.reshape(scale, (ROWS, 128))
    column = tl.program_id(1) * 128 + tl.arange(0, 128)
    mask = (index < rows)[:, None] & (column < in_features)[None, :]
    # The scratch is another kernel's until that one has ended.
    release_successor(PDL)
    wait_for_predecessor(PDL)
    tl.store(
        out + index.to(tl.int64)[:, None] * in_features + column[None, :],
        values.to(out.dtype.element_ty),
        mask=mask,
    )
