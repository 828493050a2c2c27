"""Times of one streamed reply, and what many of them say together. All times are seconds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Timeline:
    """When a request was sent, and when its tokens came.

    Attributes:
        sent: time of the call, on the same clock as the events.
        prompt_tokens: length of the prompt.
        events: (time, number of tokens) of each piece of the reply; more than one token where
            the engine or the network put several into one piece.
        reported_tokens: length of the reply where pieces do not tell theirs, as in a server's
            stream of texts.
    """

    sent: float
    prompt_tokens: int
    events: list[tuple[float, int]] = field(default_factory=list)
    reported_tokens: int | None = None

    @property
    def output_tokens(self) -> int:
        if self.reported_tokens is not None:
            return self.reported_tokens
        return sum(count for _, count in self.events)

    @property
    def ttft(self) -> float:
        """Time to first token: first piece minus call."""
        return self.events[0][0] - self.sent

    @property
    def e2e(self) -> float:
        """End to end: last piece minus call."""
        return self.events[-1][0] - self.sent

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None if there is only one."""
        others = self.output_tokens - 1
        return (self.e2e - self.ttft) / others if others > 0 else None

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies as clients see them: gaps between pieces."""
        times = [time for time, _ in self.events]
        return [later - earlier for earlier, later in zip(times, times[1:])]

    @property
    def token_latencies(self) -> list[float]:
        """Latency of every token after the first.

        The first token of a piece took the piece's gap and the others none, so many tokens in one
        piece make low percentiles look better than they feel: report the number of pieces too.
        """
        latencies = [0.0] * (self.events[0][1] - 1)
        for gap, (_, count) in zip(self.itl, self.events[1:]):
            latencies += [gap] + [0.0] * (count - 1)
        return latencies


def percentile(values: Iterable[float], percent: float) -> float:
    """Interpolated linearly between the closest ranks; not a number if there are no values."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


@dataclass(frozen=True, slots=True)
class Summary:
    """What is told of many values; each is not a number if there are none."""

    mean: float
    median: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        mean = statistics.fmean(values) if values else math.nan
        return cls(mean, percentile(values, 50), percentile(values, 90), percentile(values, 99))


def latency_summaries(timelines: Sequence[Timeline]) -> dict[str, Summary]:
    """TTFT, TPOT, ITL and E2EL of finished requests; TPOT counts each request once."""
    return {
        "TTFT": Summary.of([t.ttft for t in timelines]),
        "TPOT": Summary.of([t.tpot for t in timelines if t.tpot is not None]),
        "ITL": Summary.of([gap for t in timelines for gap in t.itl]),
        "E2EL": Summary.of([t.e2e for t in timelines]),
    }
