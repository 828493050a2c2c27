"""Equal streams at once: throughput and token latency by concurrency and lengths.

The definitions are those of LMDeploy's benchmark of this name: throughput counts generated tokens
over the whole wall time, so prefill is included.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from backend.benchmark.engine_session import (
    EngineSession,
    open_engine,
    random_prompt,
    run_concurrently,
)
from backend.benchmark.metrics import Timeline, percentile
from backend.benchmark.report import check_csv, print_trace, table, write_csv
from backend.benchmark.settings import engine_config, launcher
from backend.config import SamplingParams
from backend.errors import UserError
from backend.job_events import write_event


@dataclass(frozen=True, slots=True)
class Case:
    """So many streams at once, each with a prompt and a reply of these lengths in tokens."""

    concurrency: int
    prompt_tokens: int
    completion_tokens: int


def grid(concurrency: Sequence[int], prompts: Sequence[int], completions: Sequence[int]
         ) -> list[Case]:
    """Every concurrency with every pair; a list of one length goes with all of the other list.

    Raises:
        UserError: the lists of lengths do not pair.
    """
    if len(prompts) != len(completions) and 1 not in (len(prompts), len(completions)):
        raise UserError(
            f"{len(prompts)} lengths after --prompt-tokens do not pair with {len(completions)} "
            "after --completion-tokens.",
            "Give equally many, or one of either.",
        )
    count = max(len(prompts), len(completions))
    pairs = list(zip(
        list(prompts) * (count if len(prompts) == 1 else 1),
        list(completions) * (count if len(completions) == 1 else 1),
    ))
    return [Case(streams, *pair) for pair in pairs for streams in concurrency]


class Steps:
    """Counts requests that have ended, as events of a job.

    Args:
        total: of all cases.
    """

    def __init__(self, total: int, clock: Callable[[], float]) -> None:
        self._done, self._total = 0, total
        self._clock, self._start = clock, clock()
        write_event("stage", stage="measure", total=total)

    def update(self) -> None:
        """One more."""
        self._done += 1
        left = (self._clock() - self._start) / self._done * (self._total - self._done)
        write_event("step", stage="measure", done=self._done, total=self._total, eta_s=left)


async def run(args: argparse.Namespace) -> int:
    """The command; prints a table, or events, and returns the exit code."""
    if args.progress == "text":
        return await _run(args)
    write_event("stage", stage="load", total=0)
    try:
        return await _run(args)
    except UserError as error:
        write_event("error", message=error.message, hint=error.hint)
        raise


async def _run(args: argparse.Namespace) -> int:
    cases = grid(args.concurrency, args.prompt_tokens, args.completion_tokens)
    check_csv(args.csv)
    config = await engine_config(args, max(args.concurrency))
    rng = random.Random(args.random_seed)
    rows: list[dict[str, Any]] = []
    async with open_engine(config, launcher(args)) as session:
        for case in cases:
            session.check_length(case.prompt_tokens + case.completion_tokens)
        trace = session.trace()
        rounds = args.warmup_rounds + args.rounds
        steps = None
        if args.progress == "json":
            steps = Steps(sum(case.concurrency for case in cases) * rounds, session.clock)
        try:
            for case in cases:
                sampling = SamplingParams(
                    temperature=args.temperature,
                    top_p=args.top_p,
                    top_k=args.top_k,
                    max_tokens=case.completion_tokens,
                    ignore_eos=True,
                )
                rows.append(await measure(
                    session, case, sampling, args.warmup_rounds, args.rounds, rng, steps))
                if steps is not None:
                    write_event("row", row=rows[-1], trace=trace)
        finally:  # an engine that dies in a large case does not take the small ones with it
            if rows and steps is None:
                print_trace(trace)
                print(table(rows), flush=True)
            if rows and args.csv is not None:
                write_csv(args.csv, rows, trace)
    if steps is not None:
        write_event("result", rows=rows, trace=trace)
    return 0


async def measure(
    session: EngineSession,
    case: Case,
    sampling: SamplingParams,
    warmup_rounds: int,
    rounds: int,
    rng: random.Random,
    steps: Steps | None = None,
) -> dict[str, Any]:
    """Run one case; returns its row. Latencies are over all test rounds together.

    Args:
        steps: is told of each request that has ended; else a bar is drawn.
    """
    timelines: list[Timeline] = []
    rates, memory = [], []
    preemptions = 0
    name = f"{case.concurrency} x ({case.prompt_tokens}, {case.completion_tokens})"
    total = case.concurrency * (warmup_rounds + rounds)
    with tqdm(total=total, desc=name, unit="request",
              disable=True if steps else None) as bar:
        for index in range(-warmup_rounds, rounds):
            requests = [
                (random_prompt(case.prompt_tokens, session.info.vocab_size, rng), sampling)
                for _ in range(case.concurrency)
            ]
            before = session.stats.num_preemptions
            finished, wall = await run_concurrently(
                session, requests, case.concurrency, steps or bar)
            if index < 0:
                continue
            timelines += finished
            rates.append(sum(t.output_tokens for t in finished) / wall)
            memory.append(session.memory_gb())
            preemptions += session.stats.num_preemptions - before
    return row(case, timelines, rates, memory, preemptions)


def row(
    case: Case,
    timelines: Sequence[Timeline],
    rates: Sequence[float],
    memory: Sequence[float | None],
    preemptions: int,
) -> dict[str, Any]:
    """Figures of a case from its test rounds: `rates` in tokens/s, `memory` in GB, a round each."""
    first = [t.ttft * 1e3 for t in timelines]
    latencies = sorted(latency * 1e3 for t in timelines for latency in t.token_latencies)
    tokens = sum(t.output_tokens for t in timelines)
    known = [size for size in memory if size is not None]
    return {
        "concurrency": case.concurrency,
        "prompt": case.prompt_tokens,
        "completion": case.completion_tokens,
        "tok/s": statistics.median(rates),
        "min": min(rates),
        "max": max(rates),
        "first_min_ms": min(first),
        "first_max_ms": max(first),
        "first_mean_ms": statistics.fmean(first),
        "p50_ms": percentile(latencies, 50),
        "p75_ms": percentile(latencies, 75),
        "p95_ms": percentile(latencies, 95),
        "p99_ms": percentile(latencies, 99),
        "tok/event": tokens / sum(len(t.events) for t in timelines),
        "preempted": preemptions,
        "mem_gb": max(known) if known else None,
    }
