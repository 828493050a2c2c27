"""Tables on the terminal, the same rows as CSV, and what a figure is traced by."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backend.benchmark.metrics import Summary
from backend.benchmark_result import csv_text
from backend.errors import UserError

PROJECT = Path(__file__).resolve().parents[2]


def format_value(value: Any) -> str:
    """A cell: three or four significant digits, "-" where there is no value."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        digits = 3 if abs(value) < 1 else 2 if abs(value) < 100 else 1
        return f"{value:.{digits}f}"
    return str(value)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of one set of columns, aligned to the right."""
    names = list(rows[0])
    cells = [names, *([format_value(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def print_trace(trace: dict[str, str]) -> None:
    """The head of a report."""
    for name, value in trace.items():
        print(f"{name + ':':<19}{value}")
    print()


def latency_table(summaries: dict[str, Summary]) -> str:
    """One line each of TTFT, TPOT, ITL, E2EL, in milliseconds."""
    return table([
        {
            "ms": name,
            "mean": summary.mean * 1e3,
            "median": summary.median * 1e3,
            "p90": summary.p90 * 1e3,
            "p99": summary.p99 * 1e3,
        }
        for name, summary in summaries.items()
    ])


def latency_columns(summaries: dict[str, Summary]) -> dict[str, float]:
    """The same figures as columns of one row, such as `ttft_p99_ms`."""
    return {
        f"{name.lower()}_{part}_ms": getattr(summary, part) * 1e3
        for name, summary in summaries.items()
        for part in ("mean", "median", "p90", "p99")
    }


def check_csv(path: str | None) -> None:
    """Find out before the measurement, not after it, whether its file can be written.

    Raises:
        UserError: it cannot.
    """
    if path is None:
        return
    try:
        with open(path, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def write_csv(path: str, rows: Sequence[dict[str, Any]], trace: dict[str, str]) -> None:
    """Write `rows`, each followed by `trace`, over what the file held.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with open(path, "w", encoding="utf-8", newline="") as file:
            file.write(csv_text(rows, trace))
    except OSError as error:
        raise _unwritable(path, error) from error


def software() -> dict[str, str]:
    """Versions that a figure depends on, without importing what they are of."""
    return {
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "triton": _version("triton"),
        "command": without_keys(sys.argv[1:]),
    }


def without_keys(words: Sequence[str]) -> str:
    """A command line without the API key in it: reports are shared."""
    text = " ".join(words)
    return re.sub(r"(--api[-_]key[= ])\S+", r"\1***", text)


def git_commit() -> str:
    """Commit of this checkout, "+changes" behind it if files differ; "unknown" without git."""

    def git(*words: str) -> str:
        run = subprocess.run(
            ["git", *words], cwd=PROJECT, capture_output=True, text=True, timeout=10, check=True
        )
        return run.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=10", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _unwritable(path: str, error: OSError) -> UserError:
    return UserError(
        f"The CSV file {path} cannot be written: {error.strerror}.", "Check the path after --csv."
    )
