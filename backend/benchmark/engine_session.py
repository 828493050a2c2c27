"""An engine for a benchmark: opened as the server opens it, and asked without HTTP."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from backend.benchmark.metrics import Timeline
from backend.benchmark.report import software
from backend.config import EngineConfig, SamplingParams
from backend.engine.async_engine import AsyncEngine
from backend.engine.launcher import Handle, ProcessHandle
from backend.engine.types import EngineStats, ModelInfo, Request
from backend.errors import UserError
from backend.memory import memory_status


class Bar(Protocol):
    """Is told of each request that has ended."""

    def update(self) -> object:
        """One more."""


@dataclass(slots=True)
class EngineSession:
    """A ready engine and how to time it.

    Attributes:
        engine: as the server uses it, in its own process.
        info: what it serves.
        startup_s: from launching the process until it takes requests.
        clock: seconds, monotonic.
    """

    engine: AsyncEngine
    info: ModelInfo
    startup_s: float
    clock: Callable[[], float]
    _ids: itertools.count[int] = field(default_factory=itertools.count)

    async def ask(self, prompt: list[int], sampling: SamplingParams) -> Timeline:
        """Run one request to its end.

        Raises:
            UserError: the engine failed it, or died.
        """
        request = Request(f"benchmark-{next(self._ids)}", prompt, sampling)
        timeline = Timeline(self.clock(), len(prompt))
        async for output in self.engine.generate(request):
            if output.finish_reason == "error":
                raise UserError(f"The engine failed a request: {output.error}")
            if output.token_ids:
                timeline.events.append((self.clock(), len(output.token_ids)))
        return timeline

    @property
    def stats(self) -> EngineStats:
        """Counters since the engine's start."""
        return self.engine.stats or EngineStats()

    def memory_gb(self) -> float | None:
        """GB (10^9 bytes) in use: of the GPUs, as nvidia-smi tells; of the engine's process on a
        CPU. None if nobody tells."""
        try:
            status = memory_status(self.engine.pid, self.info)
        except ImportError:  # the driver's package is not installed
            return None
        if status is None:
            return None
        size = status.engine if self.info.device == "cpu" else status.used
        return size / 1e9 or None

    def check_length(self, tokens: int) -> None:
        """Refuse what would be cut off silently.

        Raises:
            UserError: a conversation of so many tokens does not fit.
        """
        info = self.info
        if tokens > info.session_len:
            raise UserError(
                f"{tokens} tokens of prompt and completion are more than the model's "
                f"{info.session_len}.",
                "Ask for fewer, or set --session-len.",
            )
        if tokens > info.num_blocks * info.block_size:
            raise UserError(
                f"A conversation of {tokens} tokens does not fit into the KV cache of "
                f"{info.num_blocks * info.block_size}.",
                "Give the KV cache more memory.",
            )

    def trace(self) -> dict[str, str]:
        """What the figures depend on, for the head of a report and the columns of its CSV."""
        info, config = self.info, self.engine.config
        kv_tokens = info.num_blocks * info.block_size
        blocks_each = -(-info.session_len // info.block_size)
        return {
            "model": f"{os.path.basename(config.model)} ({info.architecture})",
            "dtype": info.dtype,
            "quantization": info.quantization or "none",
            "weights_gb": f"{info.weight_bytes / 1e9:.2f}",
            "device": info.device if info.tp == 1 else f"{info.tp} x {info.device}",
            "kv_cache": f"{kv_tokens} tokens of {info.kv_bits} bit "
            f"({kv_tokens * info.kv_bytes_per_token / 1e9:.2f} GB)",
            "conversations_fit": f"{info.num_blocks // blocks_each} of {info.session_len} tokens",
            "max_batch_size": str(info.max_batch_size),
            "prefix_caching": "on" if config.enable_prefix_caching else "off",
            "startup_s": f"{self.startup_s:.1f}",
            **software(),
        }


@asynccontextmanager
async def open_engine(
    config: EngineConfig,
    launch: Callable[[], Handle] = ProcessHandle,
    clock: Callable[[], float] = time.perf_counter,
) -> AsyncIterator[EngineSession]:
    """Start an engine, wait until it is ready, and end it afterwards.

    Raises:
        UserError: the model cannot be loaded; says why.
    """
    engine = AsyncEngine(config, launch)
    begin = clock()
    await engine.start()
    try:
        info = await engine.wait_ready()
        yield EngineSession(engine, info, clock() - begin, clock)
    finally:
        await engine.stop()


def random_prompt(length: int, vocab_size: int, rng: random.Random) -> list[int]:
    """Random token ids, so that no two prompts share a prefix worth caching."""
    return [rng.randrange(vocab_size) for _ in range(length)]


async def run_concurrently(
    session: EngineSession,
    requests: Sequence[tuple[list[int], SamplingParams]],
    concurrency: int,
    bar: Bar,
) -> tuple[list[Timeline], float]:
    """Run all requests, `concurrency` of them open at a time.

    Returns:
        Timelines in the requests' order, and the wall time of all.

    Raises:
        UserError: one failed; the others are aborted.
    """
    timelines: list[Timeline | None] = [None] * len(requests)
    waiting = iter(enumerate(requests))

    async def worker() -> None:
        for index, (prompt, sampling) in waiting:  # shared: each takes the next one
            timelines[index] = await session.ask(prompt, sampling)
            bar.update()

    begin = session.clock()
    workers = [asyncio.create_task(worker()) for _ in range(min(concurrency, len(requests)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    finished = [timeline for timeline in timelines if timeline is not None]
    return finished, session.clock() - begin
