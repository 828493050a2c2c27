"""Many prompts of mixed lengths through the engine without HTTP: requests and tokens a second."""

from __future__ import annotations

import argparse
import random
from typing import Any

from tqdm import tqdm

from backend.benchmark.engine_session import (
    EngineSession,
    open_engine,
    random_prompt,
    run_concurrently,
)
from backend.benchmark.lengths import read_conversations, read_lengths
from backend.benchmark.metrics import latency_summaries
from backend.benchmark.report import (
    check_csv,
    latency_columns,
    latency_table,
    print_trace,
    table,
    write_csv,
)
from backend.benchmark.settings import engine_config, launcher
from backend.config import EngineConfig, SamplingParams

Work = list[tuple[list[int], int]]  # prompt ids and tokens of the reply


async def run(args: argparse.Namespace) -> int:
    """The command; prints tables and returns the exit code."""
    check_csv(args.csv)
    config = await engine_config(args, args.concurrency)
    conversations = None if args.dataset is None else dataset(args, config)
    rng = random.Random(args.random_seed)
    rows, summaries = [], []
    async with open_engine(config, launcher(args)) as session:
        work: Work = conversations or [
            (random_prompt(prompt, session.info.vocab_size, rng), output)
            for prompt, output in read_lengths(args.num_prompts)
        ]
        session.check_length(max(len(prompt) + output for prompt, output in work))
        trace = session.trace()
        # The same lengths with other tokens: batches of every size have been met before it counts.
        first = [
            (random_prompt(len(prompt), session.info.vocab_size, rng), output)
            for prompt, output in work[: args.warmup_prompts]
        ]
        if first:
            await measure(session, first, args, "warm-up")
        for index in range(args.rounds):
            row, summary = await measure(session, work, args, f"round {index + 1}")
            rows.append(row)
            summaries.append(summary)
    print_trace(trace)
    print(table(rows))
    for summary in summaries:
        print("\n" + latency_table(summary))
    if args.csv is not None:
        flat = [{**row, **latency_columns(summary)} for row, summary in zip(rows, summaries)]
        write_csv(args.csv, flat, trace)
    return 0


def dataset(args: argparse.Namespace, config: EngineConfig) -> Work:
    """Prompts and reply lengths of `--dataset`.

    Raises:
        UserError: the file or the tokenizer cannot be read.
    """
    from backend.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(args.tokenizer or config.model)
    found = read_conversations(args.dataset, tokenizer.encode, args.num_prompts, args.random_seed)
    return [(ids, output) for _, ids, output in found]


async def measure(
    session: EngineSession, work: Work, args: argparse.Namespace, name: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run all of `work` once; returns its row and its latency summaries."""
    requests = [
        (
            prompt,
            SamplingParams(
                temperature=args.temperature,
                top_p=args.top_p,
                top_k=args.top_k,
                max_tokens=output,
                ignore_eos=True,
            ),
        )
        for prompt, output in work
    ]
    before = session.stats
    steps, preemptions = before.num_steps, before.num_preemptions
    with tqdm(total=len(requests), desc=name, unit="request", disable=None) as bar:
        timelines, wall = await run_concurrently(session, requests, args.concurrency, bar)
    output_tokens = sum(t.output_tokens for t in timelines)
    row = {
        "round": name.removeprefix("round "),
        "requests": len(timelines),
        "concurrency": args.concurrency,
        "wall_s": wall,
        "req/s": len(timelines) / wall,
        "output_tok/s": output_tokens / wall,
        "input_tok/s": sum(t.prompt_tokens for t in timelines) / wall,
        "tok/step": output_tokens / max(session.stats.num_steps - steps, 1),
        "preempted": session.stats.num_preemptions - preemptions,
        "mem_gb": session.memory_gb(),
    }
    return row, latency_summaries(timelines)
