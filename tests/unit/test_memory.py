"""Whose the device's memory is, as the status bar shows it."""

from __future__ import annotations

import os

import pytest

from backend import memory
from backend.engine.types import EngineStats
from backend.memory import PARTS, memory_parts, memory_status
from tests.fake_model import fake_info

GB = 1 << 30


def test_the_parts_are_the_whole_device() -> None:
    parts = memory_parts(10 * GB, used=14 * GB, total=16 * GB, weights=4 * GB, kv_cache=5 * GB,
                         kv_used=GB)
    assert parts == dict(weights=4 * GB, kv_used=GB, kv_reserved=4 * GB, engine=GB,
                         others=4 * GB, free=2 * GB)
    assert tuple(parts) == PARTS


@pytest.mark.parametrize("taken", [0, 3, 4, 7, 9, 30])
def test_nothing_is_counted_twice_nor_below_zero(taken: int) -> None:
    """A process whose pool was not touched yet holds less than it has reserved; and figures of
    different moments need not agree."""
    parts = memory_parts(taken, used=8, total=20, weights=4, kv_cache=5, kv_used=1)
    assert all(size >= 0 for size in parts.values())
    of_engine = sum(parts[name] for name in ("weights", "kv_used", "kv_reserved", "engine"))
    assert of_engine == min(taken, 20) and sum(parts.values()) == 20


def test_of_this_machine() -> None:
    """A pool takes none of it before it is written to: there is no reserve."""
    info = fake_info(num_blocks=100, block_size=8)
    status = memory_status(os.getpid(), info, None)
    assert status is not None and sum(status.parts.values()) == status.total
    assert status.parts["kv_used"] == 0 == status.parts["kv_reserved"]
    assert status.kv_cache == 800
    stats = EngineStats(num_blocks_free=60, num_blocks_cached=15)
    status = memory_status(os.getpid(), info, stats)
    assert status is not None and status.parts["kv_used"] == 25 * 8
    assert status.parts["kv_reserved"] == 0
    assert status.parts["engine"] == pytest.approx(status.engine, rel=0.01)


def test_of_a_gpu_whose_driver_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    info = fake_info()
    info.device = "Some GPU"
    monkeypatch.setattr(memory, "gpu_memory", lambda count: (0, 0))
    status = memory_status(os.getpid(), info, None)
    assert status is not None and status.total == 0 and status.parts == {}


def test_of_a_gpu_it_is_what_the_engine_took(monkeypatch: pytest.MonkeyPatch) -> None:
    info = fake_info()
    info.device, info.device_bytes, info.weight_bytes = "Some GPU", 9 * GB, 5 * GB
    monkeypatch.setattr(memory, "gpu_memory", lambda count: (12 * GB, 16 * GB))
    status = memory_status(os.getpid(), info, None)
    assert status is not None
    assert (status.parts["others"], status.parts["free"]) == (3 * GB, 4 * GB)
    assert status.parts["weights"] == 5 * GB
