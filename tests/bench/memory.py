"""GPU memory that a served model takes, its KV pool capped to what the conversations need.

    python -m tests.bench.memory --shapes llama-2-7b llama-2-13b --quantization none awq \
        --kv-cache-dtype auto int8 --contexts 2048 4096 --batch-sizes 1

One engine a line, in a process of its own, with random weights: the pool holds `batch size`
conversations of `context` tokens, and so many are held, to their last token. "in use" is what the
GPU has given away since before the engine was started (weights, pool, graphs, workspaces and the
process's CUDA context), as nvidia-smi would tell it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
from typing import Any

from tqdm import tqdm

from backend.benchmark.engine_session import open_engine, random_prompt, run_concurrently
from backend.benchmark.report import table
from backend.benchmark.settings import engine_config, launcher
from backend.config import SamplingParams
from backend.memory import gpu_memory


async def measure(args: argparse.Namespace, case: dict[str, Any]) -> dict[str, Any]:
    """One engine's row."""
    size, context = case["batch_size"], case["context"]
    given = argparse.Namespace(
        random_weights=case["shape"],
        quantization=None if case["quantization"] == "none" else case["quantization"],
        random_weights_dir=args.random_weights_dir,
        inline=False, temperature=0.0, top_p=1.0, top_k=0,
        max_batch_size=size, session_len=context, kv_cache_tokens=size * context,
        kv_cache_dtype=case["kv_cache_dtype"],
    )  # fmt: skip
    config = await engine_config(given, size)
    before = gpu_memory(1)[0]
    async with open_engine(config, launcher(given)) as session:
        ready = gpu_memory(1)[0] - before
        rng = random.Random(0)
        sampling = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
        work = [
            (random_prompt(context - 64, session.info.vocab_size, rng), sampling)
            for _ in range(size)
        ]
        await run_concurrently(session, work, size, tqdm(total=size, disable=True))
        info = session.info
        return case | {
            "weights_gb": info.weight_bytes / 1e9,
            "kv_gb": info.num_blocks * info.block_size * info.kv_bytes_per_token / 1e9,
            "ready_gb": ready / 1e9,
            "in_use_gb": (gpu_memory(1)[0] - before) / 1e9,
        }


async def run(args: argparse.Namespace) -> None:
    names = ("shape", "quantization", "kv_cache_dtype", "context", "batch_size")
    cases = itertools.product(
        args.shapes, args.quantization, args.kv_cache_dtype, args.contexts, args.batch_sizes
    )
    rows = []
    for case in cases:
        rows.append(await measure(args, dict(zip(names, case, strict=True))))
        print(rows[-1], flush=True)
    print(table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["llama-2-7b", "llama-2-13b"])
    parser.add_argument("--quantization", nargs="+", choices=("none", "awq"), default=["awq"])
    parser.add_argument(
        "--kv-cache-dtype", nargs="+", choices=("auto", "int8", "int4"), default=["auto", "int8"]
    )
    parser.add_argument("--contexts", nargs="+", type=int, default=[2048, 4096])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1])
    parser.add_argument("--random-weights-dir", metavar="DIR")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
