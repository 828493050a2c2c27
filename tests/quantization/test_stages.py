"""Seconds by stage, and the most memory held."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from quantize.stages import PeakMemory, StageTimes, peak_memory
from quantize.verdict import Measured, Verdict

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_stage_within_a_stage_counts_for_itself():
    clock = Clock()
    times = StageTimes(clock)
    clock.now += 1
    with times("load"):
        clock.now += 2
        with times("search"):
            clock.now += 4
        clock.now += 8
    with times("search"):
        clock.now += 16
    clock.now += 32
    assert times.seconds() == {"load": 10.0, "search": 20.0, "other": 33.0}
    clock.now += 0.004
    assert sum(times.seconds().values()) == 63.0  # asking ends nothing
    assert list(times.seconds()) == ["load", "search", "other"]


def test_a_stage_ends_with_its_error():
    clock = Clock()
    times = StageTimes(clock)
    with pytest.raises(ValueError), times("load"):
        clock.now += 2
        raise ValueError
    clock.now += 1
    assert times.seconds() == {"load": 2.0, "other": 1.0}


PEAK = """
import json
from quantize.stages import peak_memory
before = peak_memory().host
held = bytearray(300_000_000)
held[:] = b"x" * len(held)
del held
print(json.dumps([before, peak_memory().host, peak_memory().gpu]))
"""


def test_the_peak_stays_when_memory_was_given_back():
    ballast = b"x" * 400_000_000  # this process's own must not be taken for the child's
    out = subprocess.run(
        [sys.executable, "-c", PEAK], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    before, after, gpu = json.loads(out)
    assert gpu is None
    assert after - before > 290_000_000
    assert peak_memory().host > len(ballast)


def test_a_verdict_tells_them():
    model = Measured("a/b", 1.0, 10, 20, "float16", (), 3.0)
    verdict = Verdict(
        True, "Passed.", 0.05, 100, 2, "text", (), model, job_seconds=70.0,
        stages={"search scale": 12.345, "other": 0.5},
        peak_memory=PeakMemory(14_200_000_000, 3_000_000_000),
    )  # fmt: skip
    table = verdict.table()
    assert "  search scale        12.35 s\n  other                0.50 s\n" in table
    assert "14.2 GB on the GPU, 3.0 GB on the host" in table
    written = json.loads(json.dumps(verdict.as_dict()))
    assert written["stages"] == {"search scale": 12.345, "other": 0.5}
    assert written["peak_memory"] == {"gpu": 14_200_000_000, "host": 3_000_000_000}
