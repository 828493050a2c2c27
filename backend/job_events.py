"""What a job tells of itself, and the sum of that: JSON objects, one a line on standard output.

{"event": "step", "done": 3, "total": 32}, and others: quantize/progress.py has them, and
backend/jobs.py reads them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from backend.benchmark_result import BenchmarkResult


def write_event(name: str, /, **values: Any) -> None:
    """Tell it on standard output."""
    print(event_line({"event": name, **values}), flush=True)


def event_line(event: dict[str, Any]) -> str:
    """An event as a line, without its end."""
    return json.dumps(finite(event), ensure_ascii=False)


def finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(slots=True)
class JobProgress:
    """The sum of a job's events (see quantize/progress.py).

    Attributes:
        stage, done, total: the stage that it is in; `total` 0 is unknown.
        eta_s: seconds until the stage ends; None is unknown.
        figures: all fields of the last "step" event, as bytes_per_s and file, or loss.
        losses: the errors that steps told, such as each layer's.
        benchmark: the rows that a benchmark's last run has told.
        notes: in order.
        result, error: fields of the event that ended its last run; None while there is none.
    """

    stage: str = ""
    done: int = 0
    total: int = 0
    eta_s: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    benchmark: BenchmarkResult = BenchmarkResult()
    notes: list[str] = field(default_factory=list)
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None

    @property
    def share(self) -> float:
        """Of the stage, from 0 to 1."""
        return min(self.done / self.total, 1.0) if self.total else 0.0

    def add(self, event: Mapping[str, Any]) -> None:
        """Count one more event in."""
        match event["event"]:
            case "run":
                self.result = self.error = self.eta_s = None
                self.benchmark = BenchmarkResult()
            case "stage":
                self.stage, self.eta_s = event["stage"], None
                self.done, self.total = event.get("done", 0), event["total"]
            case "step":
                self.stage = event.get("stage", self.stage)
                self.done, self.total = event["done"], event["total"]
                self.eta_s, self.figures = event.get("eta_s"), dict(event)
                if isinstance(event.get("loss"), int | float):
                    self.losses.append(event["loss"])
            case "row":
                self.benchmark = self.benchmark.plus(event)
            case "note":
                self.notes.append(event["text"])
            case "result":
                self.result = dict(event)
            case "error":
                self.error = dict(event)
