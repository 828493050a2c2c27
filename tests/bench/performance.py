"""The table of docs/performance.md: one model's cases, in one engine, as profile_generation does.

    python -m tests.bench.performance --random-weights llama-2-7b --quantization awq \
        --quant-policy 8 [--cases 1x1+512 64x1+2048 ...] [--rounds 3] [--csv FILE]

A case is CONCURRENCYxPROMPT+COMPLETION. With a completion of one token, the figure that counts is
the first token's latency.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
from typing import Any

from backend.benchmark.engine_session import open_engine
from backend.benchmark.profile_generation import Case, measure
from backend.benchmark.report import print_trace, table, write_csv
from backend.benchmark.settings import engine_config, launcher
from backend.config import EngineConfig, SamplingParams, add_arguments

CASES = (
    "1x1+512", "4x1+512", "16x1+512", "64x1+512", "64x1+2048", "128x128+512", "256x128+512",
    "1x2048+1", "1x4000+1",
)  # fmt: skip


def case(text: str) -> Case:
    found = re.fullmatch(r"(\d+)x(\d+)\+(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"CONCURRENCYxPROMPT+COMPLETION expected, not {text!r}")
    return Case(*map(int, found.groups()))


async def run(args: argparse.Namespace) -> None:
    config = await engine_config(args, max(c.concurrency for c in args.cases))
    rng = random.Random(0)
    rows: list[dict[str, Any]] = []
    async with open_engine(config, launcher(args)) as session:
        print_trace(session.trace())
        for one in args.cases:
            sampling = SamplingParams(
                temperature=0.0, max_tokens=one.completion_tokens, ignore_eos=True
            )
            rows.append(await measure(session, one, sampling, args.warmup_rounds, args.rounds, rng))
            row = rows[-1]
            print(
                f"{one.concurrency}x{one.prompt_tokens}+{one.completion_tokens}:"
                f" {row['tok/s']:.1f} tok/s ({row['min']:.1f} to {row['max']:.1f}),"
                f" first token {row['first_mean_ms']:.2f} ms, in use {row['mem_gb'] or 0:.2f} GB",
                flush=True,
            )
        print(table(rows))
        if args.csv:
            write_csv(args.csv, rows, session.trace())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, EngineConfig)
    parser.add_argument("--random-weights", metavar="SHAPE")
    parser.add_argument("--random-weights-dir", metavar="DIR")
    parser.add_argument("--quantization", choices=("awq",))
    parser.add_argument("--inline", action="store_true")
    parser.add_argument("--cases", type=case, nargs="+", default=[case(text) for text in CASES])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup-rounds", type=int, default=1)
    parser.add_argument("--csv")
    parser.set_defaults(temperature=0.0, top_p=1.0, top_k=0)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
