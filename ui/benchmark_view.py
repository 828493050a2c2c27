"""A benchmark's rows as plots and a table. Drawn here: no script, and nothing is fetched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from backend.benchmark_result import BenchmarkResult, Row
from ui.i18n import t

WIDTH, HEIGHT = 420, 210  # of a plot, in its own units
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 14, 34  # margins
# Plot -> its lines, each a column of a row.
PLOTS: dict[str, tuple[str, ...]] = {
    "throughput": ("tok/s",),
    "first": ("first_mean_ms", "first_max_ms"),
    "between": ("p50_ms", "p95_ms"),
}
COLUMNS = ("concurrency", "prompt", "completion", "tok/s", "first_mean_ms", "first_max_ms",
           "p50_ms", "p95_ms", "mem_gb")
LINES = {"first_mean_ms": "mean", "first_max_ms": "slowest",
         "p50_ms": "p50", "p95_ms": "p95"}


def benchmark_html(result: BenchmarkResult, locale: str) -> str:
    """Plots over concurrency, and all figures; nothing without rows."""
    if not result.rows:
        return ""
    plots = "".join(plot_html(name, result.rows, locale) for name in PLOTS)
    trace = " · ".join(result.trace[key] for key in ("model", "device", "dtype", "kv_cache")
                       if result.trace.get(key))
    return (f'<section class="lmd-benchmark"><p class="lmd-figures">{escape(trace)}</p>'
            f'<div class="lmd-charts">{plots}</div>{table_html(result.rows, locale)}</section>')


def plot_html(name: str, rows: Sequence[Row], locale: str) -> str:
    """One plot: a line a column, over the rows' concurrency."""
    columns = PLOTS[name]
    title = t(f"benchmark.plot.{name}", locale)
    top = _ceiling(max((_number(row, c) or 0.0 for row in rows for c in columns), default=0.0))
    step = (WIDTH - LEFT - RIGHT) / max(len(rows) - 1, 1)
    xs = [LEFT + step * i if len(rows) > 1 else (LEFT + WIDTH - RIGHT) / 2
          for i in range(len(rows))]

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top

    parts = [f'<path class="lmd-grid-line" d="M{LEFT} {y(top * i / 4):.1f}H{WIDTH - RIGHT}"/>'
             f'<text x="{LEFT - 6}" y="{y(top * i / 4) + 4:.1f}" text-anchor="end">'
             f"{_short(top * i / 4)}</text>" for i in range(5)]
    parts += [f'<text x="{x:.1f}" y="{HEIGHT - 16}" text-anchor="middle">{row["concurrency"]}'
              "</text>" for x, row in zip(xs, rows)]
    axis = escape(t("benchmark.axis", locale))
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.1f}" y="{HEIGHT - 2}" '
                 f'text-anchor="middle">{axis}</text>')
    for number, column in enumerate(columns):
        points = [(x, value, row) for x, row in zip(xs, rows)
                  if (value := _number(row, column)) is not None]
        path = "L".join(f"{x:.1f} {y(value):.1f}" for x, value, _ in points)
        parts.append(f'<path class="lmd-line lmd-line-{number}" d="M{path}"/>' if points else "")
        parts += [f'<circle class="lmd-dot lmd-line-{number}" cx="{x:.1f}" cy="{y(value):.1f}" '
                  f'r="4"><title>{row["concurrency"]}: {_short(value)}</title></circle>'
                  for x, value, row in points]
    legend = "".join(
        f'<span class="lmd-key lmd-line-{number}">'
        f'{escape(t(f"benchmark.line.{LINES[column]}", locale))}</span>'
        for number, column in enumerate(columns)) if len(columns) > 1 else ""
    return (f'<figure class="lmd-chart" data-plot="{name}"><figcaption>{escape(title)}{legend}'
            f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{escape(title)}">{"".join(parts)}</svg></figure>')


def table_html(rows: Sequence[Row], locale: str) -> str:
    """The figures that people look at; the CSV file has all."""
    head = "".join(f"<th>{escape(t(f'benchmark.column.{_key(c)}', locale))}</th>" for c in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_cell(row, column))}</td>" for column in COLUMNS) + "</tr>"
        for row in rows)
    return (f'<div class="lmd-wide"><table class="lmd-table"><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def _key(column: str) -> str:
    return column.replace("/", "_per_")


def _cell(row: Row, column: str) -> str:
    value = _number(row, column)
    if value is None:
        return "–"
    return str(round(value)) if column in COLUMNS[:3] else _short(value)


def _number(row: Mapping[str, object], column: str) -> float | None:
    value = row.get(column)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _short(value: float) -> str:
    """Three digits that tell."""
    if value >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ceiling(value: float) -> float:
    """The next of 1, 2, 2.5, 4, 5, 8, 10 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 2.5, 4, 5, 8, 10) if m * power >= value * 0.9999)
