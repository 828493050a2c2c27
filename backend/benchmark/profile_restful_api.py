"""Load on a running OpenAI-compatible server: latency and throughput by the rate of requests."""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from backend.benchmark.api_client import ApiClient, Completion, first_model, http_client
from backend.benchmark.engine_session import random_prompt
from backend.benchmark.lengths import Pair, random_words, read_conversations, read_lengths
from backend.benchmark.metrics import Timeline, latency_summaries
from backend.benchmark.report import (
    check_csv,
    latency_columns,
    latency_table,
    print_trace,
    software,
    table,
    write_csv,
)
from backend.errors import UserError
from backend.remote_http import normalise_url

GOALS = ("ttft", "tpot", "e2el")  # what --goodput can bound


@dataclass(slots=True)
class Outcome:
    """What came of one rate: finished requests, why others failed, the wall time in seconds."""

    timelines: list[Timeline]
    errors: list[str]
    wall: float


async def run(args: argparse.Namespace) -> int:
    """The command; prints tables and returns the exit code."""
    check_csv(args.csv)
    goals = parse_goals(args.goodput)
    requests = workload(args)
    rows, summaries = [], []
    trace = {"server": normalise_url(args.url), "model": args.model_name, **software()}
    async with http_client(trace["server"], args.api_key) as http:
        trace["model"] = trace["model"] or await first_model(http)
        client = ApiClient(http, trace["model"], time.perf_counter)
        await client.complete(requests[0])  # a server that refuses is told before the load
        for rate in args.sweep or [args.request_rate]:
            rng = random.Random(args.random_seed)  # every rate has the same arrivals, scaled
            arrivals = arrival_times(len(requests), rate, args.burstiness, rng)
            with tqdm(total=len(requests), desc=f"{rate} req/s", disable=None) as bar:
                outcome = await send(client, requests, arrivals, args.max_concurrency, bar)
            if not outcome.timelines:
                raise UserError(f"All {len(requests)} requests failed: {outcome.errors[0]}")
            rows.append(row(rate, outcome, goals))
            summaries.append(latency_summaries(outcome.timelines))
            for text in sorted(set(outcome.errors))[:3]:
                tqdm.write(f"{outcome.errors.count(text)} failed at {rate} req/s: {text}")
    print_trace(trace)
    print(table(rows))
    for values, summary in zip(rows, summaries):
        print(f"\n{values['rate']} req/s\n" + latency_table(summary))
    if args.csv is not None:
        flat = [{**values, **latency_columns(summary)} for values, summary in zip(rows, summaries)]
        write_csv(args.csv, flat, trace)
    return 0


def workload(args: argparse.Namespace) -> list[Completion]:
    """The requests: of a data set, of one length, or of mixed lengths.

    Raises:
        UserError: the data set or its tokenizer cannot be read, or flags contradict.
    """
    fixed = (args.prompt_tokens, args.completion_tokens)
    if (fixed[0] is None) != (fixed[1] is None) or (args.dataset and fixed[0] is not None):
        raise UserError(
            "--prompt-tokens and --completion-tokens go together, and without --dataset.",
            "Give both, or neither for mixed lengths.",
        )
    if args.dataset is not None:
        return _conversations(args)
    pairs: list[Pair] = (
        read_lengths(args.num_prompts) if fixed[0] is None else [fixed] * args.num_prompts
    )
    rng = random.Random(args.random_seed)
    return [
        Completion(
            random_words(prompt, rng)
            if args.prompt_form == "text"
            else random_prompt(prompt, args.vocab_size, rng),
            output,
        )
        for prompt, output in pairs
    ]


def _conversations(args: argparse.Namespace) -> list[Completion]:
    from backend.tokenizer import Tokenizer

    if args.tokenizer is None:
        raise UserError(
            "--dataset needs a tokenizer, to tell lengths.", "Name the model's folder: --tokenizer."
        )
    encode = Tokenizer.from_folder(args.tokenizer).encode
    found = read_conversations(args.dataset, encode, args.num_prompts, args.random_seed)
    as_text = args.prompt_form == "text"
    return [Completion(text if as_text else ids, output) for text, ids, output in found]


def arrival_times(count: int, rate: float, burstiness: float, rng: random.Random) -> list[float]:
    """Seconds from the start at which requests are sent; the first at once.

    Args:
        count: of requests.
        rate: requests a second on average; infinite sends all at once.
        burstiness: shape of the gaps' gamma distribution. 1 is a Poisson process, less has more
            bursts, more is more regular.
        rng: source of the gaps.
    """
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        if math.isfinite(rate):
            now += rng.gammavariate(burstiness, 1 / (rate * burstiness))
    return times


async def send(
    client: ApiClient,
    requests: Sequence[Completion],
    arrivals: Sequence[float],
    max_concurrency: int | None,
    bar: tqdm,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Outcome:
    """Send each request at its time, or later if `max_concurrency` are open; a request's own
    clock starts when it is sent. A request that fails ends no other.
    """
    room = asyncio.Semaphore(max_concurrency or len(requests))

    async def one(request: Completion) -> Timeline | UserError:
        async with room:
            try:
                return await client.complete(request)
            except UserError as error:
                return error
            finally:
                bar.update()

    begin = client.clock()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for request, arrival in zip(requests, arrivals):
            if (delay := begin + arrival - client.clock()) > 0:
                await sleep(delay)
            tasks.append(group.create_task(one(request)))
    wall = client.clock() - begin
    results = [task.result() for task in tasks]
    return Outcome(
        [result for result in results if isinstance(result, Timeline)],
        [str(result) for result in results if isinstance(result, UserError)],
        wall,
    )


def parse_goals(words: Sequence[str]) -> dict[str, float]:
    """`ttft:200` -> {"ttft": 0.2}.

    Raises:
        UserError: another name, or no number.
    """
    goals = {}
    for word in words:
        name, _, value = word.partition(":")
        try:
            goals[name] = float(value) / 1e3
        except ValueError:
            goals[name] = math.nan
        if name not in GOALS or not goals[name] > 0:
            raise UserError(
                f"{word!r} after --goodput is not a bound in milliseconds.",
                f"Write it like ttft:200; names: {', '.join(GOALS)}.",
            )
    return goals


def meets(timeline: Timeline, goals: dict[str, float]) -> bool:
    """Whether a request kept within all bounds; one token has no time per further token."""
    measured = {"ttft": timeline.ttft, "tpot": timeline.tpot or 0.0, "e2el": timeline.e2e}
    return all(measured[name] <= bound for name, bound in goals.items())


def row(rate: float, outcome: Outcome, goals: dict[str, float]) -> dict[str, Any]:
    """Figures of one rate."""
    timelines, wall = outcome.timelines, outcome.wall
    output = sum(t.output_tokens for t in timelines)
    prompt = sum(t.prompt_tokens for t in timelines)
    good = sum(meets(t, goals) for t in timelines) / wall if goals else None
    return {
        "rate": str(rate),
        "finished": len(timelines),
        "failed": len(outcome.errors),
        "wall_s": wall,
        "req/s": len(timelines) / wall,
        "output_tok/s": output / wall,
        "total_tok/s": (output + prompt) / wall,
        "goodput_req/s": good,
    }
