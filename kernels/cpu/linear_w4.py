"""Products with 4-bit weights on a CPU: torch's own kernel for few rows, unpacked tiles for many.

Both read bfloat16 alone, scales and zeros too. Rounding an AWQ checkpoint's float16 scales to it
costs a mean KL of 3e-5 on the bundled model, rounding the unpacked weights 2e-5, rounding the
activations 3.5e-4.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

import kernels.reference
from kernels.ops import silu_and_mul
from kernels.packing import W4Weight

PADDED_OUTPUTS = 64  # torch's largest block: more outputs than this are whole blocks
# torch's kernel goes over the weights anew for each four rows, in float32; unpacked once, they are
# multiplied in bfloat16. One thread with AVX-512 and no AMX, 1024 x 4096, ms: the kernel 0.21 at
# 1 row, 1.5 at 16, 3.0 at 32, 12.4 at 128; unpacking 2.9, the product then 1.5 at 32, 5.2 at 128.
UNPACKED_MIN_ROWS = 48
TILE_WEIGHTS = 1 << 21  # unpacked at a time: 4 MB, which stay in the cache


def supports(dtype: torch.dtype) -> bool:
    """Whether activations of `dtype` are multiplied by 4-bit weights faster than by 16-bit ones.

    In float16 and float32 torch's kernel has no vector code: 35 times the time of bfloat16.
    """
    return dtype == torch.bfloat16


def pack(q: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> W4Weight:
    """q uint8 [N, K], scales float [N, K / group], zeros uint8 [N, K / group] for this module.

    Of the result, qweight is uint8 [N padded, K / 2] in torch's order and scale_zero bfloat16
    [K / group, N padded, 2]: a weight is (q - 8) * scale + zero. N is padded to a multiple of 64.
    """
    rows, columns = q.shape
    padded = -(-rows // PADDED_OUTPUTS) * PADDED_OUTPUTS
    numbers = q.new_zeros(padded, columns, dtype=torch.int32)
    numbers[:rows] = q
    scale_zero = q.new_zeros(columns // group_size, padded, 2, dtype=torch.bfloat16)
    scale_zero[:, :rows, 0] = scales.t()
    # Of the rounded scale, so that the two stay consistent.
    scale_zero[:, :rows, 1] = (8 - zeros.t().float()) * scale_zero[:, :rows, 0].float()
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
    return W4Weight(words, scale_zero, group_size, rows, columns)


def linear_w4(
    x: Tensor, weight: W4Weight, bias: Tensor | None, batch_invariant: bool = False
) -> Tensor:
    """See `kernels.ops.linear_w4`. Fast for x bfloat16 and a weight from `pack` only."""
    if weight.qweight.dtype != torch.uint8:
        return kernels.reference.linear_w4(x, weight, bias, batch_invariant)
    if len(x) < UNPACKED_MIN_ROWS or batch_invariant or not _block_outputs():
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), weight.qweight, weight.group_size, weight.scale_zero
        )
    else:
        product = _by_tiles(x, weight)
    product = product[:, : weight.out_features].contiguous()
    return product if bias is None else product.add_(bias)


def gated_linear_w4(x: Tensor, weight: W4Weight, batch_invariant: bool = False) -> Tensor:
    """See `kernels.ops.gated_linear_w4`."""
    return silu_and_mul(linear_w4(x, weight, None, batch_invariant))


def _by_tiles(x: Tensor, weight: W4Weight) -> Tensor:
    """x [T, K] times the unpacked weights of some outputs after another: [T, N padded]."""
    outputs = weight.qweight.shape[0]
    block = _block_outputs()
    step = max(TILE_WEIGHTS // weight.in_features // block, 1) * block
    product = x.new_empty(len(x), outputs)
    for start in range(0, outputs, step):
        stop = min(start + step, outputs)
        tile = _unpack(
            weight.qweight[start:stop], weight.scale_zero[:, start:stop], weight.group_size, block
        )
        product[:, start:stop] = x @ tile
    return product


def _unpack(words: Tensor, scale_zero: Tensor, group_size: int, block: int) -> Tensor:
    """Weights of whole blocks of outputs, bfloat16 [K, outputs]."""
    groups, outputs = scale_zero.shape[:2]
    half = block // 2
    # By groups, inputs, blocks, halves, outputs of a half.
    tile = scale_zero.new_empty(groups, group_size, outputs // block, 2, half)
    # A block's bytes, one run an input: its first outputs are the low halves, the others the high.
    packed = words.view(-1, groups, group_size, half).permute(1, 2, 0, 3)
    # [2, 1 group, 1 input, 1 block ...]: read along outputs, so each of the two in one run.
    scales, zeros = scale_zero.movedim(-1, 0).unflatten(-1, (-1, 2, half)).unsqueeze(2).contiguous()
    for part, numbers in enumerate((packed & 15, packed >> 4)):
        centred = numbers.view(torch.int8).sub_(8).to(torch.bfloat16)
        torch.addcmul(zeros[..., part, :], centred, scales[..., part, :], out=tile[..., part, :])
    return tile.view(groups * group_size, outputs)


@cache
def _block_outputs() -> int:
    """How many outputs torch packs together on this machine; 0 if not in the order known here.

    A block of them is stored input by input, output n in the low half of byte n and output
    n + block / 2 in the high half of the same byte.
    """
    q = torch.arange(128 * 64, dtype=torch.int32).remainder_(241).remainder_(16).view(128, 64)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    for block in (64, 32):  # AVX-512; AVX2
        runs = packed.view(-1, 64, block // 2)
        found = torch.cat((runs & 15, runs >> 4), dim=-1).transpose(1, 2).reshape(q.shape)
        if torch.equal(found.int(), q):
            return block
    return 0
