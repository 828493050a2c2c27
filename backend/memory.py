"""Memory figures for people: what the engine's process and its device use."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil

from backend.engine.types import ModelInfo


@dataclass(slots=True)
class MemoryStatus:
    """Bytes. `used` and `total` are the device's (the GPU's, or the machine's on a CPU)."""

    used: int
    total: int
    engine: int  # resident memory of the engine's process
    weights: int
    kv_cache: int


def memory_status(engine_pid: int | None, info: ModelInfo | None) -> MemoryStatus | None:
    """Figures for the engine with process id `engine_pid`; None while there is no model."""
    if engine_pid is None or info is None:
        return None
    try:
        resident = psutil.Process(engine_pid).memory_info().rss
    except psutil.Error:  # it died a moment ago
        return None
    if info.device == "cpu":
        machine = psutil.virtual_memory()
        used, total = machine.total - machine.available, machine.total
    else:
        used, total = gpu_memory(info.tp)
    kv_cache = info.num_blocks * info.block_size * info.kv_bytes_per_token
    return MemoryStatus(used, total, resident, info.weight_bytes, kv_cache)


def gpu_memory(count: int) -> tuple[int, int]:
    """(used, total) of the first `count` visible GPUs, other people's processes included.

    (0, 0) if the driver does not tell.
    """
    import pynvml  # the module of the package nvidia-ml-py

    try:
        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = [name.strip() for name in visible if name.strip()] or [
            str(index) for index in range(pynvml.nvmlDeviceGetCount())
        ]
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(int(name))
            if name.isdigit()
            else pynvml.nvmlDeviceGetHandleByUUID(name)
            for name in names[:count]
        ]
        infos = [pynvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
    except pynvml.NVMLError:
        return 0, 0
    return sum(i.used for i in infos), sum(i.total for i in infos)
