"""W8A8 products on a CPU: oneDNN's, by the instructions that multiply int8 (VNNI, AMX)."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from kernels.packing import W8Weight


def linear_w8(
    x: Tensor, weight: W8Weight, bias: Tensor | None, batch_invariant: bool = False
) -> Tensor:
    """See `kernels.ops.linear_w8`; the reference's bits, with and without `batch_invariant`.

    `weight` may be as `reorder` returned it. 2 cores with AMX, both busy, µs at 1, 16, 128 rows of
    11008 x 4096, rounding of x and scaling left out: reordered 1260, 1057, 3489; as it is 1758,
    1995, 5030; in bfloat16 1991, 1938, 8384. Of 1536 x 512, 51, 66, 148; 47, 57, 158; 27, 31, 100:
    a small model is no faster for being of 8 bits. One thread with VNNI and no AMX, ms at 1, 16, 64
    rows of 1024 x 4096: 0.33, 0.45, 1.3; in bfloat16 0.60, 0.84, 2.7.
    """
    quantized, scales = _quantize_tokens(x)
    if weight.qweight.is_mkldnn:
        ones = torch.ones_like(weight.scales)
        zeros = torch.zeros_like(weight.scales, dtype=torch.int64)
        zero_point = _zero_point()
        if zero_point:  # the highest bit turned over adds 128
            quantized = quantized.view(torch.uint8) ^ zero_point
        product = torch.ops.onednn.qlinear_pointwise(
            quantized, 1.0, zero_point, weight.qweight, ones, zeros, None, 1.0, 0, torch.float32,
            "none", [], "",
        )  # fmt: skip
    else:
        product = torch._int_mm(quantized, weight.qweight.t()).float()
    # In the reference's order, for its bits.
    product.mul_(scales).mul_(weight.scales)
    if bias is not None:
        product.add_(bias)
    return product.to(x.dtype)


def reorder(weight: W8Weight) -> W8Weight:
    """The same weight, its numbers as oneDNN reads them fastest, where this machine can.

    Without instructions for int8, oneDNN adds two products in 16 bits, where they saturate: there
    the weight stays as it is.
    """
    if not _multiplies_int8():
        return weight
    return replace(weight, qweight=torch.ops.onednn.qlinear_prepack(weight.qweight, None))


def _multiplies_int8() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("amx_int8", "avx512_vnni", "avx_vnni"))


@cache
def _zero_point() -> int:
    """What is added to x for oneDNN, which takes it off its exact sums again.

    VNNI multiplies uint8 by int8; for int8 by int8 of a reordered weight oneDNN has fast code with
    AMX only: without, one row of 4096 x 4096 takes it 1.1 s. (A weight that is not reordered takes
    two to four times as long as uint8 by a reordered one at 8 to 64 rows.)
    """
    return 0 if torch.cpu.get_capabilities().get("amx_int8") else 128


def _quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] as int8 [T, K] and float32 scales [T, 1]: its largest absolute element is 127."""
    x32 = x.float()
    scales = x32.abs().amax(-1, keepdim=True).clamp_(min=1e-10).div_(127)
    return (x32 / scales).round_().to(torch.int8), scales
