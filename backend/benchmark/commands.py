"""The command lines of the benchmarks; what runs them is imported only when it is run."""

from __future__ import annotations

import argparse
import math
from typing import Any

from backend.config import EngineConfig, add_arguments


def add_commands(group: Any) -> None:
    """Add one subcommand for each benchmark to argparse's `group` of subparsers."""
    sub = _engine_command(
        group, "profile_generation", "equal streams: throughput and token latency", _generation
    )
    sub.add_argument("--concurrency", type=count, nargs="+", default=[1], help="streams at once")
    text = "lengths of prompts; pairs with --completion-tokens one by one"
    sub.add_argument("--prompt-tokens", type=count, nargs="+", default=[1], help=text)
    text = "lengths of replies"
    sub.add_argument("--completion-tokens", type=count, nargs="+", default=[512], help=text)
    text = "rounds that are measured (default: 3)"
    sub.add_argument("--rounds", type=count, default=3, help=text)
    text = "rounds before them (default: 1)"
    sub.add_argument("--warmup-rounds", type=count_or_none, default=1, help=text)
    text = "text for people, or json: an event a line on standard output"
    sub.add_argument("--progress", choices=("text", "json"), default="text", help=text)

    sub = _engine_command(
        group, "profile_throughput", "mixed lengths: requests and tokens a second", _throughput
    )
    text = "requests open at a time (default: 256)"
    sub.add_argument("--concurrency", type=count, default=256, help=text)
    text = "requests at the beginning that do not count (default: 256)"
    sub.add_argument("--warmup-prompts", type=count_or_none, default=256, help=text)
    text = "times that all is run (default: 1)"
    sub.add_argument("--rounds", type=count, default=1, help=text)
    _workload(sub, "MODEL")
    _restful_command(group)


def _restful_command(group: Any) -> None:
    text = "a running OpenAI-compatible server: latency under load"
    sub = group.add_parser("profile_restful_api", help=text, description=text, allow_abbrev=False)
    sub.set_defaults(run=_restful)
    sub.add_argument("url", metavar="URL", help="such as http://127.0.0.1:23333")
    sub.add_argument("--api-key", default="", help="key of the server, if it has one")
    sub.add_argument("--model-name", default="", help="default: the first that the server lists")
    rates = sub.add_mutually_exclusive_group()
    text = "requests a second that arrive on average (default: inf, all at once)"
    rates.add_argument("--request-rate", type=positive, default=math.inf, metavar="R", help=text)
    text = "several rates, one after another"
    rates.add_argument("--sweep", type=positive, nargs="+", metavar="R", help=text)
    text = "1 is a Poisson process, less has more bursts (default: 1)"
    sub.add_argument("--burstiness", type=burstiness, default=1.0, help=text)
    text = "requests open at a time (default: no bound)"
    sub.add_argument("--max-concurrency", type=count, help=text)
    text = "count requests within bounds in ms, such as ttft:200 tpot:20"
    sub.add_argument("--goodput", nargs="+", default=[], metavar="NAME:MS", help=text)
    text = "what prompts are sent as (default: ids)"
    sub.add_argument("--prompt-form", choices=("ids", "text"), default="ids", help=text)
    text = "random ids are below it (default: 256, which every vocabulary has)"
    sub.add_argument("--vocab-size", type=count, default=256, help=text)
    text = "one length of all prompts, instead of mixed lengths"
    sub.add_argument("--prompt-tokens", type=count, help=text)
    sub.add_argument("--completion-tokens", type=count, help="one length of all replies")
    _workload(sub, "none")
    _common(sub)


def _workload(sub: argparse.ArgumentParser, tokenizer: str) -> None:
    text = "requests (default: 1000)"
    sub.add_argument("--num-prompts", type=count, default=1000, help=text)
    text = "a ShareGPT JSON file, instead of the list of lengths that LMDesk brings"
    sub.add_argument("--dataset", metavar="FILE", help=text)
    text = f"folder of the tokenizer for --dataset (default: {tokenizer})"
    sub.add_argument("--tokenizer", metavar="DIR", help=text)


def _engine_command(group: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    """A benchmark of an engine that it starts itself."""
    sub = group.add_parser(name, help=text, description=text, allow_abbrev=False)
    sub.set_defaults(run=run)
    add_arguments(sub, EngineConfig)
    text = "instead of MODEL: make a model of this shape with random weights, and keep it"
    sub.add_argument("--random-weights", metavar="SHAPE", help=text)
    text = "where to keep it (default: lmdesk/random-weights in the user's cache)"
    sub.add_argument("--random-weights-dir", metavar="DIR", help=text)
    text = "of the random weights: 4 bits in groups of 128 (default: 16 bit)"
    sub.add_argument("--quantization", choices=("awq",), help=text)
    text = "run the engine in this process instead of a child"
    sub.add_argument("--inline", action="store_true", help=text)
    sub.add_argument("--temperature", type=float, default=0.0, help="default: 0, greedy")
    sub.add_argument("--top-p", type=float, default=1.0, help="default: 1")
    sub.add_argument("--top-k", type=int, default=0, help="default: 0, all")
    _common(sub)
    return sub


def _common(sub: argparse.ArgumentParser) -> None:
    text = "of the random prompts (default: 0)"
    sub.add_argument("--random-seed", type=int, default=0, help=text)
    sub.add_argument("--csv", metavar="FILE", help="write the table to this file too")


def count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 expected, not {text!r}")
    return int(text)


def count_or_none(text: str) -> int:
    """A whole number from 0."""
    return 0 if text == "0" else count(text)


def positive(text: str) -> float:
    """A number above 0; inf is one."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"a number above 0 expected, not {text!r}")
    return value


def burstiness(text: str) -> float:
    """A number above 0 that a distribution can have as its shape."""
    value = positive(text)
    if value > 1e6:
        raise argparse.ArgumentTypeError(f"a number up to 1000000 expected, not {text!r}")
    return value


async def _generation(args: argparse.Namespace) -> int:
    from backend.benchmark.profile_generation import run

    return await run(args)


async def _throughput(args: argparse.Namespace) -> int:
    from backend.benchmark.profile_throughput import run

    return await run(args)


async def _restful(args: argparse.Namespace) -> int:
    from backend.benchmark.profile_restful_api import run

    return await run(args)
