"""How far a job is: a line for a terminal, or a JSON object a line for the page.

JSON lines, one event each (seconds since the job began as `elapsed_s`):

    {"event": "stage", "stage": "quantize", "total": 32}
    {"event": "step", "stage": "quantize", "done": 3, "total": 32, "eta_s": 41.2, "loss": 0.01}
    {"event": "note", "text": "..."}
    {"event": "result", ...}         what the command found out or wrote
    {"event": "error", "message": "...", "hint": "...", "field": "work_dir"}
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from backend.errors import UserError
from backend.job_events import event_line
from quantize.stages import StageTimes

QUIET_S = 10.0  # between lines of one stage in a log; a terminal's line is drawn anew each time


class Progress:
    """Reports of one job.

    Args:
        style: "text" writes for people to standard error, "json" events to standard output.
        stream: instead of those.
        clock: seconds from any origin.

    Attributes:
        notes: all that were given, for whoever keeps them with the result.
        times: seconds of the job's parts.
    """

    def __init__(
        self,
        style: str = "text",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.json = style == "json"
        self._stream = stream or (sys.stdout if self.json else sys.stderr)
        self._clock = clock
        self.notes: list[str] = []
        self.times = StageTimes(clock)
        self._start = self._stage_start = self._last_line = clock()
        self._stage, self._done, self._total, self._resumed = "", 0, 0, 0
        self._redraw = not self.json and self._stream.isatty()
        self._open_line = False

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """A new stage begins, of `total` steps, of which an earlier run did the first `done`."""
        self._close_line()
        self._stage, self._total, self._done, self._resumed = name, total, done, done
        self._stage_start = self._clock()
        self._last_line = -math.inf
        self._event("stage", stage=name, total=total, done=done)

    def step(self, **figures: Any) -> None:
        """One more step is done; `figures` are numbers or words to show beside it."""
        self._done += 1
        self._event(
            "step", stage=self._stage, done=self._done, total=self._total, eta_s=self.eta(),
            **figures,
        )
        now, last = self._clock(), self._done == self._total
        if self.json or not (self._redraw or last or now - self._last_line >= QUIET_S):
            return
        self._last_line = now
        shown = "".join(f"  {name} {_figure(value)}" for name, value in figures.items())
        left = "" if last else f"  about {duration(self.eta())} left"
        self._write(f"{self._stage} {self._done}/{self._total}{left}{shown}", last)

    def eta(self) -> float:
        """Seconds until this stage ends, if it goes on as it did."""
        done = self._done - self._resumed
        if done < 1:
            return 0.0
        return (self._clock() - self._stage_start) / done * max(self._total - self._done, 0)

    def elapsed(self) -> float:
        """Seconds since the job began."""
        return self._clock() - self._start

    def note(self, text: str) -> None:
        """Something that the user should know, such as that another text was calibrated on."""
        self.notes.append(text)
        self._event("note", text=text)
        if not self.json:
            self._close_line()
            self._write(text, True)

    def result(self, values: Mapping[str, Any], text: str = "") -> None:
        """What came out: `values` for the page, `text` for a terminal's standard output."""
        self._close_line()
        self._event("result", **values)
        if text and not self.json:
            print(text)

    def error(self, error: UserError) -> None:
        """The job ends by `error`. In text, whoever catches it tells it."""
        self._close_line()
        self._event("error", message=error.message, hint=error.hint, field=error.field)

    def _event(self, event: str, **values: Any) -> None:
        if not self.json:
            return
        record = {"event": event, "elapsed_s": round(self.elapsed(), 3), **values}
        self._stream.write(event_line(record) + "\n")
        self._stream.flush()

    def _write(self, text: str, ends: bool) -> None:
        if self._redraw:
            self._stream.write("\r\033[K" + text + ("\n" if ends else ""))
            self._open_line = not ends
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def _close_line(self) -> None:
        if self._open_line:
            self._stream.write("\n")
            self._open_line = False


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
