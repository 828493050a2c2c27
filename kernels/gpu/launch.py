"""Programmatic dependent launch: a kernel starts while its predecessor still runs.

From compute capability 9.0 on, a kernel launched with `launch_pdl=True` may begin as soon as every
program of the kernel before it has said `release_successor` (or ended). What that kernel wrote may
be read, and what it reads may be overwritten, only after `wait_for_predecessor`; before it, only
what no kernel changes (weights) may be touched. Every kernel of a chain waits, so a kernel that has
waited knows that all before it are done. In a CUDA graph on an H200 a tiny kernel costs 0.56 µs so,
0.83 µs otherwise.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def wait_for_predecessor(PDL: tl.constexpr):
    """Wait until all kernels before this one are done and what they wrote can be seen."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release_successor(PDL: tl.constexpr):
    """Let the next kernel start; it still waits for this one's end before it reads results."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


def supports_pdl(x: Tensor) -> bool:
    """Whether kernels on x's device may be launched so; False in the interpreter."""
    return x.is_cuda and _capability(x.device.index or 0) >= (9, 0)


def launch_options(pdl: bool) -> dict[str, bool]:
    """Keyword arguments of a launch; none where the device does not know them."""
    return {"launch_pdl": True} if pdl else {}


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def num_sms(index: int) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(index).multi_processor_count
