"""Figures of this machine: engine against transformers, the engine's own cost, the first answer.

    python -m tests.bench.foundation [--model DIR] [--only NAME ...] [--tokens 128]

Prints a Markdown table; docs/benchmarks.md holds one as it was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import torch

from backend.config import EngineConfig, SamplingParams
from backend.engine.engine import Engine
from backend.engine.types import Request, Sequence
from backend.engine.worker import build_engine
from tests.fake_model import FakeRunner, fake_info

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "assets" / "demo_model"
PROMPT_TOKENS = 64
REPEATS = 5
Row = tuple[str, str, str]  # what, measured, aim


def prompts(count: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(300, vocab_size, (count, PROMPT_TOKENS), generator=generator).tolist()


def median_seconds(work: Callable[[], object]) -> float:
    """Median of several runs after one that does not count."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def run_engine(engine: Engine, batch: list[list[int]], tokens: int) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    for i, prompt in enumerate(batch):
        engine.add_request(Request(str(i), prompt, sampling))
    while engine.has_work():
        engine.step()


def against_transformers(model: Path, tokens: int, dtype: str) -> list[Row]:
    """Greedy, the same prompts, prefill included, prefix cache off; both in the same dtype."""
    from transformers import AutoModelForCausalLM

    config = EngineConfig(model=str(model), dtype=dtype, enable_prefix_caching=False)
    engine = build_engine(config)
    dtype = engine.runner.info.dtype
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    rows = []
    for size, aim in ((1, 1.5), (16, 4.0)):
        batch = prompts(size, engine.runner.info.vocab_size)
        ids = torch.tensor(batch)
        their_s = median_seconds(
            lambda ids=ids: theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                pad_token_id=0,
            )
        )
        our_s = median_seconds(lambda batch=batch: run_engine(engine, batch, tokens))
        count = size * tokens
        rows.append(
            (
                f"batch {size}, {PROMPT_TOKENS} + {tokens} tokens, {dtype}: tokens/s",
                f"{count / our_s:.0f}; transformers' generate {count / their_s:.0f}; "
                f"{their_s / our_s:.2f}x",
                f"{aim}x",
            )
        )
    return rows


def own_cost(tokens: int) -> list[Row]:
    """A step without a model: scheduling, blocks, bookkeeping."""
    rows = []
    for size, aim in ((1, "150 µs"), (64, "1 ms")):
        info = fake_info(session_len=2048, max_batch_size=size, num_blocks=4096, block_size=64)

        def next_token(seq: Sequence) -> int:
            return 5

        engine = Engine(FakeRunner(info, next_token))
        work = partial(run_engine, engine, prompts(size, info.vocab_size), tokens)
        seconds = median_seconds(work) / tokens
        rows.append((f"engine's own cost a step, batch {size}", f"{seconds * 1e6:.0f} µs", aim))
    return rows


def first_answer() -> list[Row]:
    """From starting the process to the first token of an answer over HTTP."""
    port = 16006
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "app.py", "--server-port", str(port)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        body = json.dumps(
            {
                "messages": [{"role": "user", "content": "What is the KV cache?"}],
                "stream": True,
                "max_tokens": 32,
            }
        ).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            body,
            {"Content-Type": "application/json"},
        )
        answered = page = None
        while answered is None and time.perf_counter() - start < 120:
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    for line in reply:
                        if b'"content":' in line and b'"content":""' not in line.replace(b" ", b""):
                            answered = time.perf_counter() - start
                            break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.05)
        url = f"http://127.0.0.1:{port}/"
        with urllib.request.urlopen(url, timeout=60) as reply:
            page = reply.status
        memory = psutil.Process(process.pid).memory_info().rss
        children = psutil.Process(process.pid).children(recursive=True)
        engine = max((child.memory_info().rss for child in children), default=0)
    finally:
        process.terminate()
        process.wait(30)
    assert page == 200 and answered is not None
    return [
        ("`python app.py` to the first answered token", f"{answered:.1f} s", "15 s"),
        ("web process, resident", f"{memory / 1e6:.0f} MB", ""),
        ("engine process, resident", f"{engine / 1e6:.0f} MB", ""),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--only", nargs="+", choices=["transformers", "own", "start"])
    args = parser.parse_args()
    parts = {
        "transformers": lambda: [
            row
            for dtype in ("auto", "float32")
            for row in against_transformers(args.model, args.tokens, dtype)
        ],
        "own": lambda: own_cost(args.tokens),
        "start": first_answer,
    }
    rows = [row for name in args.only or parts for row in parts[name]()]
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| what | measured | aim |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
