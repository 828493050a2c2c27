"""Linear layers with weights of 4 bits (W4A16): the choice of the kernel and its launch.

Few tokens: `w4_mma` and `w4_wide`, bound by the memory. A batch: `w4_dot`, or on Hopper, prompts of
up to 2048 tokens too, `w4_wgmma`, bound by the tensor cores. Other prompts: the weight is unpacked
into a scratch, in slices if it is large, and cuBLAS multiplies.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels.gpu.elementwise import silu_and_mul
from kernels.gpu.launch import cdiv, launch, launch_options, num_sms, supports_pdl
from kernels.gpu.linear import product_into, slice_rows
from kernels.gpu.tuning import (
    DotConfig,
    MmaConfig,
    W4Config,
    WgmmaConfig,
    WideConfig,
    bucket_of,
    gpu_name,
    invariant_config,
    w4_config,
)
from kernels.gpu.w4_dot import w4_dequantize_kernel, w4_dot_kernel
from kernels.gpu.w4_mma import w4_mma_kernel
from kernels.gpu.w4_wide import w4_wide_kernel
from kernels.packing import TILE_COLUMNS, TILE_ROWS, W4Weight

# Bytes of unpacked weight at a time: the largest matrix of a 7B model in one piece. Smaller pieces
# would stay in the L2 cache, but each waits for its own unpacking.
SCRATCH_BYTES = 192 << 20
# Tiles of the result that may have their columns split among programs.
MAX_SPLIT_TILES = 1 << 16
# Multiprocessors that the rule of the table is applied for where there is no GPU.
INTERPRETED_SMS = 4


def linear_w4(
    x: Tensor, weight: W4Weight, bias: Tensor | None, batch_invariant: bool = False
) -> Tensor:
    """See `kernels.ops.linear_w4`. Rows of x may lie apart; its columns must not.

    Raises:
        ValueError: x is not float16 or bfloat16 [T, in_features], or the GPU is older than 8.0.
    """
    return _linear(x, weight, bias, False, batch_invariant)


def gated_linear_w4(x: Tensor, weight: W4Weight, batch_invariant: bool = False) -> Tensor:
    """See `kernels.ops.gated_linear_w4`.

    Raises:
        ValueError: as `linear_w4`, or the weight has an odd number of rows.
    """
    if weight.out_features % 2:
        raise ValueError(f"a gated product of {weight.out_features} rows, which is odd")
    return _linear(x, weight, None, True, batch_invariant)


def _linear(
    x: Tensor, weight: W4Weight, bias: Tensor | None, gated: bool, batch_invariant: bool
) -> Tensor:
    x = _checked(x, weight)
    out_features = weight.out_features // 2 if gated else weight.out_features
    if not x.shape[0]:
        return x.new_empty(0, out_features)
    if batch_invariant:
        return run(x, weight, bias, gated, invariant_config(weight.group_size))
    hopper = x.is_cuda and runs_wgmma(x, weight)
    bucket = bucket_of(x.shape[0], hopper)
    if bucket is None:
        return unpacked_product(x, weight, bias, gated)
    index = x.device.index or 0
    config = w4_config(
        gpu_name(index) if x.is_cuda else "",
        num_sms(index) if x.is_cuda else INTERPRETED_SMS,
        "gated_linear_w4" if gated else "linear_w4",
        weight.out_features,
        weight.in_features,
        bucket,
        hopper,
    )
    return run(x, weight, bias, gated, config)


def _checked(x: Tensor, weight: W4Weight) -> Tensor:
    """x [T, in_features] as the kernels can read it."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"W4A16 takes float16 or bfloat16, not {x.dtype}")
    if x.dim() != 2 or x.shape[1] != weight.in_features:
        raise ValueError(f"x {list(x.shape)} for a weight of {weight.in_features} columns")
    if x.is_cuda and _capability(x.device.index or 0) < (8, 0):
        raise ValueError("W4A16 needs a GPU of compute capability 8.0 or newer")
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)  # 16 bytes are loaded at a time
    return x


def runs_wgmma(x: Tensor, weight: W4Weight) -> bool:
    """Whether the kernel for Hopper serves this product; its language comes with Triton 3.6."""
    wgmma = _wgmma(x.device.index or 0)
    return wgmma is not None and wgmma.usable(x, weight)


@cache
def _wgmma(index: int) -> Any:
    """The module for Hopper, or None: for other GPUs it is never imported."""
    if _capability(index)[0] != 9:
        return None
    try:
        return importlib.import_module("kernels.gpu.w4_wgmma")
    except ImportError:
        return None


def run(
    x: Tensor, weight: W4Weight, bias: Tensor | None, gated: bool, config: W4Config
) -> Tensor:
    """One launch of the kernel that `config` names."""
    rows = weight.out_features // 2 if gated else weight.out_features
    out = x.new_empty(x.shape[0], rows)
    pdl = supports_pdl(x)
    if isinstance(config, WgmmaConfig):
        flags = _counters(x.device)
        _wgmma(x.device.index or 0).wgmma_product(x, weight, bias, gated, config, out, flags, pdl)
        return out
    last_row = weight.qweight.shape[0] * TILE_ROWS - 1
    common: dict[str, Any] = {
        "GROUPS": TILE_COLUMNS // weight.group_size,
        "GATED": gated,
        "BIAS": bias is not None,
        "BF16": x.dtype is torch.bfloat16,
        "ASM": x.is_cuda,
        "PDL": pdl,
        "num_warps": config.warps,
        **launch_options(pdl),
    }
    token_programs = cdiv(x.shape[0], config.tokens)
    given_bias = out if bias is None else bias
    if isinstance(config, WideConfig):
        strips = cdiv(rows, (8 if gated else 16) * config.blocks)
        sms = num_sms(x.device.index or 0) if x.is_cuda else INTERPRETED_SMS
        pairs = x.view(torch.int32)
        launch(
            w4_wide_kernel,
            (min(strips, sms) if config.keep else strips, token_programs),
            pairs,
            weight.qweight,
            weight.scale_zero,
            given_bias,
            out,
            x.shape[0],
            pairs.stride(0),
            rows,
            rows,
            last_row,
            strips,
            x_pairs=pairs.shape[1],
            COLUMN_TILES=weight.qweight.shape[1],
            BLOCKS=config.blocks,
            WARPS=config.warps,
            AHEAD=config.ahead,
            KEEP=config.keep,
            num_stages=1,
            **common,
        )
        return out
    if isinstance(config, MmaConfig):
        pairs = x.view(torch.int32)
        launch(
            w4_mma_kernel,
            (cdiv(weight.out_features, 16 * config.blocks), token_programs),
            pairs,
            weight.qweight,
            weight.scale_zero,
            given_bias,
            out,
            x.shape[0],
            pairs.stride(0),
            rows,
            rows,
            last_row,
            x_pairs=pairs.shape[1],
            COLUMN_TILES=weight.qweight.shape[1],
            BLOCKS=config.blocks,
            WARPS=config.warps,
            AHEAD=config.ahead,
            TOKENS=config.tokens,
            num_stages=1,
            **common,
        )
        return out
    tile_rows = config.rows // 2 if gated else config.rows
    programs = cdiv(rows, tile_rows)
    partials, counters = _split_space(x, programs * token_programs, config)
    launch(
        w4_dot_kernel,
        (programs * config.splits, token_programs),
        x,
        weight.qweight,
        weight.scale_zero,
        given_bias,
        out,
        partials,
        counters,
        x.shape[0],
        x.stride(0),
        rows,
        rows,
        last_row,
        weight.in_features,
        weight.qweight.shape[1],
        config.splits,
        ROWS=config.rows,
        TOKENS=config.tokens,
        SPLIT=config.splits > 1,
        WHOLE_TILES=weight.in_features % TILE_COLUMNS == 0,
        # Sums of a tile have one scale only if the tile is one group.
        SCALE_WEIGHTS=config.scale_weights or weight.group_size != TILE_COLUMNS,
        num_stages=config.stages,
        **common,
    )
    return out


def _split_space(x: Tensor, tiles: int, config: DotConfig) -> tuple[Tensor, Tensor]:
    """Room for the sums of split columns, and counters that are zero."""
    counters = _counters(x.device)
    if config.splits == 1:
        return x, counters
    if tiles > MAX_SPLIT_TILES:
        raise ValueError(f"{tiles} tiles with split columns; {MAX_SPLIT_TILES} at most")
    size = tiles * config.splits * config.rows * config.tokens
    partials = torch.empty(size, dtype=torch.float32, device=x.device)
    return partials, counters


@cache
def _counters(device: torch.device) -> Tensor:
    """Zeros, which every launch leaves zero: products of one device run one after another.

    Made at the first call, which must come before a CUDA graph is captured; as it compiles the
    kernel, it has to anyway.
    """
    return torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=device)


def unpacked_product(x: Tensor, weight: W4Weight, bias: Tensor | None, gated: bool) -> Tensor:
    """The product through slices of the unpacked weight."""
    rows, columns = weight.out_features, weight.in_features
    out = x.new_empty(x.shape[0], rows)
    step = slice_rows(rows, columns, SCRATCH_BYTES)
    scratch = x.new_empty(min(rows, step), columns)
    for first in range(0, rows, step):
        part = scratch[: min(rows - first, step)]
        _dequantize(weight, first // TILE_ROWS, part)
        product_into(out[:, first : first + step], x, part)
    del scratch, part  # their room is there for what follows
    if bias is not None:
        out += bias
    return silu_and_mul(out) if gated else out


def _dequantize(weight: W4Weight, first_tile: int, out: Tensor) -> None:
    """Rows first_tile * 64 on, as many as `out` [rows, in_features] has, as its type."""
    pdl = supports_pdl(out)
    launch(
        w4_dequantize_kernel,
        (cdiv(out.shape[0], TILE_ROWS), weight.qweight.shape[1]),
        weight.qweight,
        weight.scale_zero,
        out,
        first_tile,
        out.shape[0],
        out.shape[1],
        COLUMN_TILES=weight.qweight.shape[1],
        GROUPS=TILE_COLUMNS // weight.group_size,
        ROWS=TILE_ROWS,
        BF16=out.dtype is torch.bfloat16,
        ASM=out.is_cuda,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
