"""Where a job's time and memory went: seconds by stage, and the most memory that it held."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

OTHER = "other"  # what no stage has asked for


class StageTimes:
    """Seconds of each stage of a job. A stage within a stage counts for itself only.

    A GPU works on after its commands were given, so that it is waited for at a stage's ends: stages
    are to be long ones, not those of an inner loop.

    Args:
        clock: seconds from any origin.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._stage, self._since = OTHER, clock()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """While entered, time is `stage`'s."""
        outer = self._stage
        self._enter(stage)
        try:
            yield
        finally:
            self._enter(outer)

    def seconds(self) -> dict[str, float]:
        """By stage, in the order in which they were entered, up to now; rounded to hundredths."""
        self._enter(self._stage)
        other = self._seconds.get(OTHER, 0.0)
        named = {name: value for name, value in self._seconds.items() if name != OTHER}
        return {name: round(value, 2) for name, value in {**named, OTHER: other}.items()}

    def _enter(self, stage: str) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = self._clock()
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now


@dataclass(frozen=True)
class PeakMemory:
    """The most bytes that this process has held so far.

    Attributes:
        gpu: that PyTorch took from the GPU, unused rests included; None without one. The driver's
            own share, about half a GB, is not in it.
        host: resident memory, with the pages of files that were mapped.
    """

    gpu: int | None
    host: int


def peak_memory() -> PeakMemory:
    """Of this process, from its start to now."""
    gpu = torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else None
    return PeakMemory(gpu, _peak_resident())


def _peak_resident() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage begins with what the parent process had
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform != "win32":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return int(psutil.Process().memory_info().peak_wset)
