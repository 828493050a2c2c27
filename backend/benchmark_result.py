"""What a benchmark has measured, for plots, a table, a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class BenchmarkResult:
    """What a benchmark's job has told so far.

    Attributes:
        rows: of one set of columns, as `benchmark profile_generation` prints them.
        trace: what the figures depend on, such as model and device.
    """

    rows: Sequence[Row] = ()
    trace: Mapping[str, str] = field(default_factory=dict)

    def plus(self, event: Mapping[str, Any]) -> BenchmarkResult:
        """With the row of a job's event {"event": "row", "row": ..., "trace": ...}."""
        return BenchmarkResult([*self.rows, event["row"]], event["trace"])

    def csv(self) -> str:
        """The rows, each followed by the trace; "" without rows."""
        return csv_text(self.rows, self.trace)


def csv_text(rows: Sequence[Row], trace: Mapping[str, str]) -> str:
    """Rows as CSV under their columns' names, each followed by `trace`; "" without rows."""
    if not rows:
        return ""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, [*rows[0], *trace])
    writer.writeheader()
    writer.writerows({**row, **trace} for row in rows)
    return file.getvalue()
