"""Memory figures for people: what the engine's process and its device use."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import psutil

from backend.engine.types import EngineStats, ModelInfo

# Whose the device's memory is. kv_reserved: of the KV pool, what no sequence uses; engine: what
# else the engine holds; others: other processes, and a GPU's driver.
PARTS = ("weights", "kv_used", "kv_reserved", "engine", "others", "free")


@dataclass(slots=True)
class MemoryStatus:
    """Bytes. `used` and `total` are the device's (the GPU's, or the machine's on a CPU).

    Attributes:
        parts: by PARTS, `total` together; empty where that is not known.
    """

    used: int
    total: int
    engine: int  # resident memory of the engine's process
    weights: int
    kv_cache: int
    parts: dict[str, int] = field(default_factory=dict)


def memory_status(
    engine_pid: int | None, info: ModelInfo | None, stats: EngineStats | None = None
) -> MemoryStatus | None:
    """Figures for the engine with process id `engine_pid`; None while there is no model.

    Args:
        stats: the engine's last ones, if it has told any yet.
    """
    if engine_pid is None or info is None:
        return None
    try:
        resident = psutil.Process(engine_pid).memory_info().rss
    except psutil.Error:  # it died a moment ago
        return None
    if info.device == "cpu":
        machine = psutil.virtual_memory()
        used, total, taken = machine.total - machine.available, machine.total, resident
    else:
        used, total = gpu_memory(info.tp)
        taken = info.device_bytes
    block_bytes = info.block_size * info.kv_bytes_per_token
    kv_cache = info.num_blocks * block_bytes
    held = info.num_blocks - stats.num_blocks_free - stats.num_blocks_cached if stats else 0
    parts = {}
    if total:
        # A CPU's memory is taken when it is first written to: what no sequence has used yet of the
        # pool counts as free, and what was used before as the engine's.
        kv_used = held * block_bytes
        parts = memory_parts(
            taken, used=used, total=total, weights=info.weight_bytes,
            kv_cache=kv_used if info.device == "cpu" else kv_cache, kv_used=kv_used,
        )
    return MemoryStatus(used, total, resident, info.weight_bytes, kv_cache, parts)


def memory_parts(
    taken: int, *, used: int, total: int, weights: int, kv_cache: int, kv_used: int
) -> dict[str, int]:
    """A device's `total` bytes by PARTS.

    Args:
        taken: by the engine, of the `used` ones; of these count first `weights` and `kv_cache`.
    """
    taken = min(taken, total)
    used = max(used, taken)
    parts, left = {}, taken
    known = (("weights", weights), ("kv_used", kv_used), ("kv_reserved", kv_cache - kv_used))
    for name, size in known:
        parts[name] = min(size, left)
        left -= parts[name]
    return {**parts, "engine": left, "others": used - taken, "free": total - used}


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
