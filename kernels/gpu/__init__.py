"""The ops in Triton, for NVIDIA GPUs from compute capability 8.0 on, under the contract's names.

Imported at the first call on a GPU (or by tests, which may ask for Triton's interpreter), so that a
machine without a GPU never loads Triton.
"""

from kernels.gpu.attention import attention, paged_attention, store_kv
from kernels.gpu.elementwise import add_rms_norm, rms_norm, silu_and_mul
from kernels.gpu.linear import linear
from kernels.gpu.linear_w4 import gated_linear_w4, linear_w4
from kernels.gpu.linear_w8 import linear_w8
from kernels.gpu.rounding import round_columns
from kernels.gpu.sampling import resolve_tokens, sample

__all__ = [
    "add_rms_norm",
    "attention",
    "gated_linear_w4",
    "linear",
    "linear_w4",
    "linear_w8",
    "paged_attention",
    "resolve_tokens",
    "rms_norm",
    "round_columns",
    "sample",
    "silu_and_mul",
    "store_kv",
]
