"""Which api_servers there are, and which of them gets the next request. Plain code: the clock and
the random source are parameters, and nothing here sends anything."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from backend.errors import EngineNotReadyError, ModelNotFoundError, UserError

MAX_NODES = 256
NUM_SAMPLES = 15  # latencies remembered of a node, as LMDeploy does
# An older latency says nothing about now; without it, a node that was slow once would be for ever.
SAMPLE_SECONDS = 300.0


@dataclass(eq=False)
class Node:
    """An api_server.

    Attributes:
        models: names that it answers to.
        speed: requests a second, or any other measure that all nodes share; None if not known.
        unfinished: requests that it works on, of this proxy's.
        healthy: whether it answered the last time.
        detail: why not, in a sentence.
        latencies: (when it finished, seconds it took) of the latest requests, oldest first.
    """

    url: str
    models: tuple[str, ...] = ()
    speed: float | None = None
    unfinished: int = 0
    healthy: bool = True
    detail: str = ""
    latencies: deque[tuple[float, float]] = field(
        default_factory=lambda: deque(maxlen=NUM_SAMPLES))


Strategy = Callable[[Sequence[Node], float, random.Random], Node]


def by_speed(nodes: Sequence[Node], now: float, rng: random.Random) -> Node:
    """Any node, a fast one more often than a slow one."""
    return rng.choices(nodes, _speeds(nodes))[0]


def least_expected(nodes: Sequence[Node], now: float, rng: random.Random) -> Node:
    """The node that would be through first with what it has and this request."""
    costs = [(node.unfinished + 1) / speed for node, speed in zip(nodes, _speeds(nodes))]
    return _least(nodes, costs, rng)


def least_observed(nodes: Sequence[Node], now: float, rng: random.Random) -> Node:
    """The node that took least time lately. One of which nothing is known gets a request first,
    but only one: the others do not wait for what may be slow."""
    times = [_recent(node, now) for node in nodes]
    untried = [n for n, known in zip(nodes, times) if not known and not n.unfinished]
    if untried:
        return rng.choice(untried)
    if not any(times):
        return _least(nodes, [node.unfinished for node in nodes], rng)
    means = [sum(known) / len(known) if known else float("inf") for known in times]
    return _least(nodes, means, rng)


STRATEGIES: dict[str, Strategy] = {
    "random": by_speed,
    "min_expected_latency": least_expected,
    "min_observed_latency": least_observed,
}


def _speeds(nodes: Sequence[Node]) -> list[float]:
    """Theirs; who has none counts as the mean of those who do."""
    known = [node.speed for node in nodes if node.speed is not None]
    usual = sum(known) / len(known) if known else 1.0
    return [usual if node.speed is None else node.speed for node in nodes]


def _recent(node: Node, now: float) -> list[float]:
    return [seconds for at, seconds in node.latencies if now - at < SAMPLE_SECONDS]


def _least(nodes: Sequence[Node], costs: Sequence[float], rng: random.Random) -> Node:
    """One of the nodes that cost least; any, so that equal ones share the work."""
    least = min(costs)
    return rng.choice([node for node, cost in zip(nodes, costs) if cost == least])


class Nodes:
    """The nodes of a proxy. Belongs to one event loop.

    Args:
        strategy: a name in `STRATEGIES`.
        clock: seconds, monotonic.
        rng: source of all chance.
    """

    def __init__(
        self,
        strategy: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._pick = STRATEGIES[strategy]
        self.clock = clock
        self._rng = rng or random.Random()
        self._by_url: dict[str, Node] = {}

    def __iter__(self) -> Iterator[Node]:
        return iter(list(self._by_url.values()))

    def get(self, url: str) -> Node | None:
        """The node at a normalised URL."""
        return self._by_url.get(url)

    def add(self, node: Node) -> Node:
        """Take in a node; one that is there already keeps its counts.

        Raises:
            UserError: there are too many.
        """
        known = self._by_url.get(node.url)
        if known is None:
            if len(self._by_url) >= MAX_NODES:
                raise UserError(f"There are {MAX_NODES} nodes already.", "Remove one first.",
                                field="url")
            known = self._by_url[node.url] = node
        known.models, known.speed = node.models, node.speed
        known.healthy, known.detail = node.healthy, node.detail
        return known

    def remove(self, url: str) -> None:
        """Let a node go; what it works on goes on.

        Raises:
            UserError: there is no such node.
        """
        if self._by_url.pop(url, None) is None:
            raise UserError(f"{url} is not a node of this proxy.", "GET /nodes/status lists them.",
                            field="url")

    def models(self) -> list[str]:
        """All models that can be asked now, in alphabetical order."""
        return sorted({model for node in self if node.healthy for model in node.models})

    def choose(
        self, model: str | None, tried: Sequence[Node] = (), preferred: object = None
    ) -> Node | None:
        """The node for the next attempt; None if all have been tried.

        Args:
            model: its name; None means the only one that there is.
            tried: nodes that have failed the request already.
            preferred: the node to take if it can answer.

        Raises:
            UserError: no model is named, and there are several.
            ModelNotFoundError: no node has it.
            EngineNotReadyError: those that have it do not answer, or none ever has.
        """
        if not tried and not any(node.models for node in self):
            raise EngineNotReadyError("No node answers.", "Try again in a moment.")
        if model is None:
            model = self._only_model()
        having = [node for node in self if model in node.models]
        if not having and not tried:
            raise ModelNotFoundError(
                f"No node serves the model {model!r:.200}.",
                f"There are: {', '.join(self.models()[:20]) or 'none'}.", field="model")
        healthy = [node for node in having if node.healthy and node not in tried]
        for node in healthy:
            if node is preferred:
                return node
        if healthy:
            return self._pick(healthy, self.clock(), self._rng)
        if tried:
            return None
        raise EngineNotReadyError(f"No node that serves {model!r:.200} answers.",
                                  "Try again in a moment.")

    def _only_model(self) -> str:
        names = {model for node in self for model in node.models}
        if len(names) > 1:
            raise UserError("Several models are served here.",
                            f"Name one: {', '.join(sorted(names)[:20])}.", field="model")
        return names.pop()

    @contextmanager
    def working(self, node: Node) -> Iterator[Work]:
        """Count a request to a node, as long as this lasts."""
        work = Work(node, self.clock)
        node.unfinished += 1
        try:
            yield work
        finally:
            node.unfinished -= 1


class Work:
    """A request to a node, timed. Only what was answered well says how fast the node is: the
    fastest answer is an error."""

    def __init__(self, node: Node, clock: Callable[[], float]) -> None:
        self.node, self._clock, self._started = node, clock, clock()

    def done(self) -> None:
        """It was answered to the end."""
        now = self._clock()
        self.node.latencies.append((now, now - self._started))
