"""Before any test imports Triton: without a GPU its kernels are interpreted, and must be from the
start, because Triton's own functions are made for one or the other when it is imported."""

from __future__ import annotations

from tests.ops import gpu_device

assert gpu_device.DEVICE
