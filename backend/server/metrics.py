"""Figures for Prometheus: the engine's gauges and totals, and the server's own times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backend.engine.types import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_GAUGES = {  # field of EngineStats -> (name, help)
    "num_running": ("lmdesk_requests_running", "Sequences in the running batch"),
    "num_waiting": ("lmdesk_requests_waiting", "Sequences that wait for a place in the batch"),
    "num_blocks_free": ("lmdesk_kv_blocks_free", "KV blocks neither owned nor cached"),
    "num_blocks_cached": ("lmdesk_kv_blocks_cached", "KV blocks that only hold a reusable prefix"),
}
_TOTALS = {
    "num_preemptions": ("lmdesk_preemptions", "Sequences set back because blocks ran out"),
    "num_steps": ("lmdesk_engine_steps", "Steps of the engine"),
    "num_prompt_tokens": ("lmdesk_prompt_tokens", "Prompt tokens, computed or from the cache"),
    "num_cached_tokens": ("lmdesk_cached_tokens", "Prompt tokens from the cache"),
    "num_output_tokens": ("lmdesk_output_tokens", "Tokens drawn"),
}


class _EngineCollector:
    """Reads the engine's own numbers when asked; totals begin anew when the engine does."""

    def __init__(self, stats: Callable[[], EngineStats | None],
                 num_blocks: Callable[[], int]) -> None:
        self._stats = stats
        self._num_blocks = num_blocks

    def collect(self) -> Iterator[Metric]:
        stats = self._stats() or EngineStats()
        for name, (metric, text) in _GAUGES.items():
            yield GaugeMetricFamily(metric, text, value=getattr(stats, name))
        yield GaugeMetricFamily("lmdesk_kv_blocks", "KV blocks in all", value=self._num_blocks())
        for name, (metric, text) in _TOTALS.items():
            yield CounterMetricFamily(metric, text, value=getattr(stats, name))


class Metrics:
    """All metrics of one server, in a registry of its own.

    Args:
        stats: the engine's latest gauges, None before its first step.
        num_blocks: KV blocks in all, 0 before the model is loaded.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        stats: Callable[[], EngineStats | None],
        num_blocks: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(stats, num_blocks))

        def times(name: str, text: str) -> Histogram:
            return Histogram(name, text, buckets=_SECONDS, registry=self.registry)

        self.requests = Counter(
            "lmdesk_http_requests", "Answered HTTP requests", ["route", "status"],
            registry=self.registry)
        self.first_token = times(
            "lmdesk_time_to_first_token_seconds", "Request to first piece of text")
        self.between = times(
            "lmdesk_inter_token_seconds", "Between two pieces of a reply, a token each as a rule")
        self.whole = times("lmdesk_reply_seconds", "Request to the end of a reply")

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)


class CountRequests:
    """Middleware that counts answers by route and status.

    Only the server's own `routes` are told apart: a label for every path that strangers think of
    would be memory that they fill.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # The router notes the route; it has not been asked if the guard refused.
                path = getattr(scope.get("route"), "path", scope["path"])
                route = path if path in self._routes else "other"
                self._metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted)


