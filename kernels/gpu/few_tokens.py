"""Products of a few tokens: weights go from memory to registers to tensor cores, nothing between.

A program has a few blocks of 16 rows of the weight and all their columns, so that nothing is added
up between programs. Its warps take chunks of 64 bytes of the rows in turn. Lane 4r + c loads 16
bytes of row r; as the columns may come in any order, these are its part of operand A of
mma.m16n8k16, and the same bytes of token r its part of B: no value passes through shared memory.
Tokens are eight wide; those that are missing cost nothing, since the memory is what is waited for.
The first loads are in flight before the kernel before this one has ended.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import (
    cdiv,
    launch,
    launch_options,
    release_successor,
    supports_pdl,
    wait_for_predecessor,
)

CHUNK = 32  # columns, 64 bytes of a row, that a warp takes at a time


class Chunks(NamedTuple):
    """How the programs of a product share it."""

    blocks: int  # of 16 rows a program
    warps: int  # which take the chunks in turn
    ahead: int  # chunks a warp has in flight


@triton.constexpr_function
def _mma_asm(bf16: bool) -> str:
    """Two mma over a chunk of 16 rows and of 8 tokens; any order of the columns is as good.

    Operands by fours: $0 results, $4 words of row r, $8 of row r + 8, $12 of token r, $16 what the
    results are added to.
    """
    kind = "bf16" if bf16 else "f16"
    mma = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{$0, $1, $2, $3}}, "
    first = mma + "{$4, $8, $5, $9}, {$12, $13}, {$16, $17, $18, $19};"
    second = mma + "{$6, $10, $7, $11}, {$14, $15}, {$0, $1, $2, $3};"
    return first + "\n" + second


# The results are written before the last of the inputs is read: "&".
MMA_CONSTRAINTS = tl.constexpr(",".join(["=&f"] * 4 + ["r"] * 12 + ["f"] * 4))


@triton.constexpr_function
def _load_asm(once: bool) -> str:
    """16 bytes, or zeros; what is read once takes no room in the first cache."""
    modifiers = ".nc.L1::no_allocate" if once else ""
    return f"""{{
.reg .pred wanted;
setp.ne.b32 wanted, $5, 0;
mov.b32 $0, 0;
mov.b32 $1, 0;
mov.b32 $2, 0;
mov.b32 $3, 0;
@wanted ld.global{modifiers}.v4.b32 {{$0, $1, $2, $3}}, [$4];
}}"""


@triton.jit
def _load_words(places, wanted, ONCE: tl.constexpr, ASM: tl.constexpr):
    """Four words a lane, zeros where not wanted.

    Not pure, so that loads keep their place before or after the wait for the kernel before this.
    """
    if ASM:
        first, second, third, fourth = tl.inline_asm_elementwise(
            _load_asm(ONCE),
            "=&r,=&r,=&r,=&r,l,r",
            [places, wanted.to(tl.int32)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    else:
        first = tl.load(places, mask=wanted, other=0)
        second = tl.load(places + 1, mask=wanted, other=0)
        third = tl.load(places + 2, mask=wanted, other=0)
        fourth = tl.load(places + 3, mask=wanted, other=0)
    return first, second, third, fourth


@triton.jit
def _multiply_add(low, high, x, sums, BF16: tl.constexpr, ASM: tl.constexpr):
    """sums plus the product of 16 rows with 8 tokens; each of four tensors [WARPS, 8, 4].

    low, high: words of rows r and r + 8; x: of token r. Of lane 4r + c, sum i is that of row
    r + 8 * (i // 2) and token 2c + i % 2: so the instruction leaves them.
    """
    if ASM:
        first, second, third, fourth = tl.inline_asm_elementwise(
            _mma_asm(BF16),
            MMA_CONSTRAINTS,
            low + high + x + sums,
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        first, second = _plain_product(low, x, BF16)
        third, fourth = _plain_product(high, x, BF16)
        first, second = sums[0] + first, sums[1] + second
        third, fourth = sums[2] + third, sums[3] + fourth
    return first, second, third, fourth


@triton.jit
def _plain_product(rows, x, BF16: tl.constexpr):
    """The product [WARPS, 8 rows, 8 tokens] as even and odd tokens, for the interpreter."""
    WARPS: tl.constexpr = rows[0].shape[0]
    total = tl.zeros([WARPS, 8, 8], dtype=tl.float32)
    for i in tl.static_range(4):
        for part in tl.static_range(2):
            w = _element(rows[i], part, BF16)[:, :, None, :]
            total += tl.sum(w * _element(x[i], part, BF16)[:, None, :, :], axis=3)
    even, odd = tl.split(tl.reshape(total, (WARPS, 8, 4, 2)))
    return even, odd


@triton.jit
def _element(words, i: tl.constexpr, BF16: tl.constexpr):
    """Element i of each word, the lower first."""
    if BF16:
        value = ((words >> (16 * i)) << 16).to(tl.float32, bitcast=True)
    else:
        value = (words >> (16 * i)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def _four(values, i: tl.constexpr):
    return values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]


@triton.jit(do_not_specialize=["tokens"])
def _few_tokens_kernel(
    x,  # int32: words of two elements
    weight,  # int32
    bias,
    out,
    tokens,
    rows,
    chunks,  # of a row
    x_stride,  # words
    weight_stride,  # words
    HAS_BIAS: tl.constexpr,
    BF16: tl.constexpr,
    BLOCKS: tl.constexpr,  # of 16 rows
    TILES: tl.constexpr,  # of 8 tokens
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,  # chunks a warp loads before it uses the first
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    # One element a lane: lane 4r + c has [warp, r, c] in whatever layout the compiler chooses.
    warp = tl.arange(0, WARPS)[:, None, None]
    r = tl.arange(0, 8)[None, :, None]
    c = tl.arange(0, 4)[None, None, :]
    lane = warp * 0 + r * 0 + 4 * c  # first word of its part of a chunk
    PARTS: tl.constexpr = 2 * BLOCKS  # rows r and r + 8 of each block
    base = tl.program_id(0) * (16 * BLOCKS)
    places = ()
    ring = ()
    sums = ()
    for part in tl.static_range(PARTS):
        row = tl.minimum(base + 8 * part + r, rows - 1).to(tl.int64)
        words = weight + row * weight_stride + warp * 16 + lane
        places = places + (words,)  # type: ignore[assignment]
    for step in tl.static_range(AHEAD):
        wanted = step * WARPS + warp + lane * 0 < chunks
        for part in tl.static_range(PARTS):
            ring = ring + _load_words(places[part] + step * WARPS * 16, wanted, True, ASM)
    for _ in tl.static_range(BLOCKS * TILES * 4):
        nought = tl.zeros([WARPS, 8, 4], dtype=tl.float32)
        sums = sums + (nought,)  # type: ignore[assignment]
    release_successor(PDL)
    wait_for_predecessor(PDL)
    for start in range(0, chunks, AHEAD * WARPS):
        following = ()
        for step in tl.static_range(AHEAD):
            first = start + step * WARPS
            within = first + warp + lane * 0 < chunks
            added = ()
            for tile in tl.static_range(TILES):
                token = 8 * tile + r
                place = x + token.to(tl.int64) * x_stride + (first + warp) * 16 + lane
                xs = _load_words(place, within & (token < tokens), False, ASM)
                for block in tl.static_range(BLOCKS):
                    low = _four(ring, step * PARTS + 2 * block)
                    high = _four(ring, step * PARTS + 2 * block + 1)
                    before = _four(sums, tile * BLOCKS + block)
                    added = added + _multiply_add(low, high, xs, before, BF16, ASM)
            sums = added
            next_first = first + AHEAD * WARPS
            wanted = next_first + warp + lane * 0 < chunks
            for part in tl.static_range(PARTS):
                following = following + _load_words(
                    places[part] + next_first * 16, wanted, True, ASM
                )
        ring = following
    # Sums as [r, c, the token's parity, the row's half].
    r = tl.arange(0, 8)[:, None, None, None]
    c = tl.arange(0, 4)[None, :, None, None]
    parity = tl.arange(0, 2)[None, None, :, None]
    half = tl.arange(0, 2)[None, None, None, :]
    for block in tl.static_range(BLOCKS):
        row = base + 16 * block + r + 8 * half
        for tile in tl.static_range(TILES):
            total = _four(sums, tile * BLOCKS + block)
            upper, lower = tl.join(total[0], total[1]), tl.join(total[2], total[3])
            value = tl.sum(tl.join(upper, lower), axis=0)
            token = 8 * tile + 2 * c + parity
            if HAS_BIAS:
                value += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
            mask = (row < rows) & (token < tokens)
            place = out + token.to(tl.int64) * rows + row
            tl.store(place, value.to(out.dtype.element_ty), mask=mask)


def few_tokens(x: Tensor, weight: Tensor, bias: Tensor | None, chunks: Chunks) -> Tensor:
    """x [T, K] times weight [N, K], both float16 or bfloat16 and both `fits_chunks`.

    Meant for T up to 8: the tokens are read again for every 16 * chunks.blocks rows.
    """
    tokens, columns = x.shape
    rows = weight.shape[0]
    out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    pdl = supports_pdl(x)
    launch(
        _few_tokens_kernel,
        (cdiv(rows, 16 * chunks.blocks),),
        x.view(torch.int32),
        weight.view(torch.int32),
        x if bias is None else bias,
        out,
        tokens,
        rows,
        columns // CHUNK,
        x.stride(0) // 2,
        weight.stride(0) // 2,
        HAS_BIAS=bias is not None,
        BF16=x.dtype is torch.bfloat16,
        BLOCKS=chunks.blocks,
        TILES=cdiv(tokens, 8),
        WARPS=chunks.warps,
        AHEAD=chunks.ahead,
        ASM=x.is_cuda,
        PDL=pdl,
        num_warps=chunks.warps,
        **launch_options(pdl),
    )
    return out


def fits_chunks(x: Tensor) -> bool:
    """Whether rows of 16-bit elements are whole chunks that start on 16 bytes."""
    return (
        x.shape[1] % CHUNK == 0
        and x.stride(1) == 1
        and x.stride(0) % 8 == 0
        and x.data_ptr() % 16 == 0
    )
