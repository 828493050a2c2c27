"""W4A16 for a batch on Hopper: the weight is unpacked while the tensor cores multiply.

Yᵀ = W Xᵀ on wgmma as in `w4_dot`, in Gluon, where it can be said what runs when. The weight goes
from memory to registers, is unpacked and scaled there and stays there as the instruction's first
operand, 64 columns at a time in two sets of registers in turn: one is filled while the instruction
reads the other, and the instruction for the one is queued before that for the other has ended. x
comes by bulk copies, some tiles of 128 columns ahead; weights are asked for one tile ahead, and
further ahead brought to the L2 cache.

As many programs as fit run, each on one tile of the result after the other. Tiles that do not go
round are cut: their column tiles are dealt out evenly, so that a program gets the end of one tile,
then its whole tiles, then the beginning of another. Who has a tile's beginning adds the others'
sums, which lie in memory by then, in the order of the columns: the same bits every time. It waits
for programs of lower numbers only, and those do that part first, so no program waits for one that
may not have begun.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.gpu.launch import cdiv, launch, launch_options, num_sms
from kernels.gpu.tuning import WgmmaConfig, division
from kernels.gpu.w4_operand import factors, halves_of, unpacked, words_layout
from kernels.packing import TILE_COLUMNS, TILE_ROWS, W4Weight

AHEAD = tl.constexpr(6)  # tiles of 128 columns, of the weight on its way to the L2 cache


@gluon.jit
def _fetch(x_desc, buffers, bars, step, tile, token, wanted, STAGES: gl.constexpr):
    """Ask for a tile of x, 128 columns: two halves, as the copies swizzle 64 at most."""
    at = step % STAGES
    bar = bars.index(at)
    mbarrier.expect(bar, x_desc.block_type.nbytes * 2, pred=wanted)
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(
            x_desc,
            [token, tile * 128 + half * 64],
            bar,
            buffers.index(at * 2 + half),
            pred=wanted,
        )


@gluon.jit
def _row_places(
    tile,
    index,
    token_tiles,
    column_tiles,
    up_row,
    last_row,
    ROWS: gl.constexpr,
    GATED: gl.constexpr,
):
    """Of a tile's rows: where their first words and scales lie."""
    block = tile // token_tiles
    if GATED:
        # Rows r of gate and, as rows r + 8 of a slab of 16, those of up.
        row = block * (ROWS // 2) + (index // 16) * 8 + index % 8 + (index % 16 // 8) * up_row
        row = gl.minimum(row, last_row)
        strip = row // 64
        within = row % 64
    else:
        strip = gl.minimum(block * (ROWS // 64) + index // 64, last_row // 64)
        within = index % 64
    return strip * (column_tiles * 1024) + within * 16, strip * (column_tiles * 64) + within


@gluon.jit
def _prefetch(pointers):
    """Bring what lies there to the L2 cache; the result means nothing."""
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers], gl.int32, False, 1
    )


@gluon.jit
def _prefetch_tile(qweight, scale_zero, word_row, scale_row, k):
    _prefetch(qweight + k * 1024 + word_row)
    _prefetch(scale_zero + k * 64 + scale_row)


@gluon.jit
def _segment(segment, program, programs, full, begin, cut, end, column_tiles):
    """Tile, first and last column tile of a program's part: of a tile that another program
    began, whole tiles, the beginning of another."""
    first_rest = full * programs + begin // column_tiles
    tile = first_rest
    start = begin % column_tiles
    stop = start + cut - begin
    if segment > full:
        tile = first_rest + 1
        start = 0
        stop = end - cut
    elif segment > 0:
        tile = (segment - 1) * programs + program
        start = 0
        stop = column_tiles
    return tile, start, stop


# By the bucket of rows only: a prompt of another length must not wait for a compilation.
@gluon.jit(
    do_not_specialize=[
        "tokens", "last_row", "column_tiles", "token_tiles", "full", "units", "remainder"
    ]
)  # fmt: skip
def w4_wgmma_kernel(
    x_desc,
    qweight,
    scale_zero,
    bias,
    out,
    partials,  # float32 [programs, ROWS, TOKENS]
    flags,  # int32 [programs], zero before and after
    tokens,
    out_features,
    up_row,
    last_row,
    column_tiles,
    token_tiles,
    full,  # whole tiles for each program
    units,  # column tiles of a program's part of the rest
    remainder,  # tiles whose columns are split
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
    GATED: gl.constexpr,
    BIAS: gl.constexpr,
    BF16: gl.constexpr,
    PDL: gl.constexpr,
    num_warps: gl.constexpr,
):
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, TOKENS, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    WORDS: gl.constexpr = words_layout(ROWS, 4, num_warps)
    HALF: gl.constexpr = words_layout(ROWS, 2, num_warps)
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, WORDS))
    OUT_ROWS: gl.constexpr = ROWS // 2 if GATED else ROWS
    DTYPE: gl.constexpr = x_desc.dtype

    programs = gl.num_programs(0)
    # Programs wait for those of lower numbers only, which were started before them.
    program = programs - 1 - gl.program_id(0)
    buffers = gl.allocate_shared_memory(DTYPE, [2 * STAGES, TOKENS, 64], x_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    index = gl.arange(0, ROWS, layout=ROW)
    c = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, WORDS)))
    c = gl.expand_dims(gl.expand_dims(c, 0), 2)
    u = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))
    u = gl.expand_dims(gl.expand_dims(u, 0), 1)

    total = remainder * column_tiles
    begin = gl.minimum(program * units, total)
    end = gl.minimum(begin + units, total)
    # Where the second tile of the rest begins.
    cut = gl.minimum((begin // column_tiles + 1) * column_tiles, end)
    step = 0
    for segment in range(0, full + 2):
        tile, start, stop = _segment(
            segment, program, programs, full, begin, cut, end, column_tiles
        )
        if stop > start:
            block = tile // token_tiles
            token = (tile % token_tiles) * TOKENS
            word_row, scale_row = _row_places(
                tile, index, token_tiles, column_tiles, up_row, last_row, ROWS, GATED
            )
            if segment < 2:
                for i in gl.static_range(AHEAD):
                    _prefetch_tile(
                        qweight, scale_zero, word_row, scale_row, gl.minimum(start + i, stop - 1)
                    )
            word_place = gl.expand_dims(gl.expand_dims(word_row, 1), 2) + 4 * c + u
            scale_place = gl.convert_layout(
                scale_row, gl.SliceLayout(1, gl.SliceLayout(2, HALF)), assert_trivial=True
            )
            words = gl.load(qweight + start * 1024 + word_place)
            scales = gl.load(scale_zero + start * 64 + scale_place)
            if PDL:
                tl.extra.cuda.gdc_wait()
            for i in gl.static_range(STAGES):
                _fetch(x_desc, buffers, bars, step + i, start + i, token, start + i < stop, STAGES)
            low, high, scale = factors(gl.expand_dims(gl.expand_dims(scales, 1), 2), BF16)
            now, later = halves_of(words, HALF)
            even = unpacked(now, low, high, scale, OPERAND, BF16)
            ahead = gl.minimum(start + 1, stop - 1)
            words = gl.load(qweight + ahead * 1024 + word_place)
            scales = gl.load(scale_zero + ahead * 64 + scale_place)
            running = gl.zeros([ROWS, TOKENS], gl.float32, layout=MMA)
            odd = even
            for k in range(start, stop):
                at = step % STAGES
                mbarrier.wait(bars.index(at), (step // STAGES) & 1)
                values = buffers.index(at * 2).permute((1, 0))
                running = warpgroup_mma(even, values, running, is_async=True)
                ahead = gl.minimum(k + 2, stop - 1)
                next_words = gl.load(qweight + ahead * 1024 + word_place)
                next_scales = gl.load(scale_zero + ahead * 64 + scale_place)
                _prefetch_tile(
                    qweight, scale_zero, word_row, scale_row, gl.minimum(k + AHEAD, stop - 1)
                )
                running, odd = warpgroup_mma_wait(1, deps=[running, odd])
                # All have waited for the tile before: its room is free.
                gl.thread_barrier()
                if k > start:
                    ahead = k + STAGES - 1
                    _fetch(
                        x_desc, buffers, bars, step + STAGES - 1, ahead, token, ahead < stop, STAGES
                    )
                odd = unpacked(later, low, high, scale, OPERAND, BF16)
                values = buffers.index(at * 2 + 1).permute((1, 0))
                running = warpgroup_mma(odd, values, running, is_async=True)
                low, high, scale = factors(gl.expand_dims(gl.expand_dims(scales, 1), 2), BF16)
                now, later = halves_of(words, HALF)
                running, even = warpgroup_mma_wait(1, deps=[running, even])
                even = unpacked(now, low, high, scale, OPERAND, BF16)
                words = next_words
                scales = next_scales
                step += 1
            acc, odd = warpgroup_mma_wait(0, deps=[running, odd])
            gl.thread_barrier()  # all are done with x before the next tile's comes
            # The next tile's first words, while this one's result is written.
            following, first, last = _segment(
                segment + 1, program, programs, full, begin, cut, end, column_tiles
            )
            if last > first and segment <= full:
                word_row, scale_row = _row_places(
                    following, index, token_tiles, column_tiles, up_row, last_row, ROWS, GATED
                )
                for i in gl.static_range(AHEAD):
                    _prefetch_tile(
                        qweight, scale_zero, word_row, scale_row, gl.minimum(first + i, last - 1)
                    )

            place = gl.arange(0, ROWS, layout=gl.SliceLayout(1, MMA))[:, None] * TOKENS
            place = place + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, MMA))[None, :]
            if start > 0:
                gl.store(partials + program.to(gl.int64) * (ROWS * TOKENS) + place, acc)
                gl.thread_barrier()
                gl.atomic_xchg(flags + program, 1, sem="release")
            else:
                # The others' sums, in the order of the columns.
                other = program + 1
                done = stop
                while done < column_tiles:
                    while gl.atomic_add(flags + other, 0, sem="acquire") == 0:
                        pass
                    acc += gl.load(
                        partials + other.to(gl.int64) * (ROWS * TOKENS) + place,
                        cache_modifier=".cg",
                    )
                    gl.thread_barrier()
                    gl.store(flags + other, 0)
                    other += 1
                    done += units
                _finish(
                    acc,
                    bias,
                    out,
                    block * OUT_ROWS,
                    token,
                    tokens,
                    out_features,
                    OUT_ROWS,
                    TOKENS,
                    GATED,
                    BIAS,
                    DTYPE,
                    num_warps,
                )
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(bars.index(i))


@gluon.jit
def _finish(
    acc,
    bias,
    out,
    first,
    token,
    tokens,
    out_features,
    OUT_ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    GATED: gl.constexpr,
    BIAS: gl.constexpr,
    DTYPE: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Write a tile of the result, out [T, out_features]."""
    if GATED:
        both = gl.reshape(acc, (OUT_ROWS // 8, 2, 8, TOKENS))
        gate, up = gl.split(gl.permute(both, (0, 2, 3, 1)))
        value = gl.reshape(gate / (1.0 + gl.exp(-gate)) * up, (OUT_ROWS, TOKENS))
    else:
        value = acc
        if BIAS:
            own = gl.arange(0, OUT_ROWS, layout=gl.SliceLayout(1, acc.type.layout)) + first
            added = gl.load(bias + own, mask=own < out_features, other=0.0)
            value = value + added.to(gl.float32)[:, None]
    lanes: gl.constexpr = min(OUT_ROWS // 8, 32)
    WIDE: gl.constexpr = gl.BlockedLayout([8, 1], [lanes, 32 // lanes], [1, num_warps], [0, 1])
    result = gl.convert_layout(value.to(DTYPE), WIDE)
    row = first + gl.arange(0, OUT_ROWS, layout=gl.SliceLayout(1, WIDE))
    at = token + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, WIDE))
    mask = (row < out_features)[:, None] & (at < tokens)[None, :]
    gl.store(out + at.to(gl.int64)[None, :] * out_features + row[:, None], result, mask=mask)


def usable(x: Tensor, weight: W4Weight) -> bool:
    """Whether bulk copies can read x, and the kernel the weight."""
    return (
        weight.group_size == TILE_COLUMNS
        and x.stride(0) % 8 == 0
        and x.data_ptr() % 16 == 0
        and x.shape[1] >= 64
    )


def wgmma_product(
    x: Tensor,
    weight: W4Weight,
    bias: Tensor | None,
    gated: bool,
    config: WgmmaConfig,
    out: Tensor,
    flags: Tensor,
    pdl: bool,
) -> None:
    """out [T, rows] = x Wᵀ + bias, or SiLU of its first half times its second.

    flags: int32 zeros, as many as programs, and zeros afterwards. x and weight: see `usable`.
    """
    tokens, rows = out.shape
    token_tiles = cdiv(tokens, config.tokens)
    tiles = cdiv(rows, config.rows // 2 if gated else config.rows) * token_tiles
    column_tiles = weight.qweight.shape[1]
    most = num_sms(x.device.index or 0) * config.programs
    parts = division(tiles, column_tiles, most, config.parts)
    size = parts.programs * config.rows * config.tokens
    partials = torch.empty(size if parts.units else 1, dtype=torch.float32, device=x.device)
    layout = gl.NVMMASharedLayout(128, 16, 2)
    options: dict[str, Any] = launch_options(pdl)
    launch(
        w4_wgmma_kernel,
        (parts.programs,),
        TensorDescriptor(x, list(x.shape), list(x.stride()), [config.tokens, 64], layout),
        weight.qweight,
        weight.scale_zero,
        out if bias is None else bias,
        out,
        partials,
        flags,
        tokens,
        rows,
        rows,
        weight.qweight.shape[0] * TILE_ROWS - 1,
        column_tiles,
        token_tiles,
        parts.full,
        parts.units,
        parts.rest,
        ROWS=config.rows,
        TOKENS=config.tokens,
        STAGES=config.stages,
        GATED=gated,
        BIAS=bias is not None,
        BF16=x.dtype is torch.bfloat16,
        PDL=pdl,
        num_warps=config.warps,
        **options,
    )
