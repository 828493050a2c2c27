"""How long `convert` takes, what memory, and how long a workspace takes to load.

    python -m tests.bench.workspace --shape llama-2-7b [--quantization awq] [--folder DIR]

Each line is a process of its own, on random weights. The disk's cache is warm: the files have just
been written. A workspace's files are hashed when it is first loaded, and not again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from backend.benchmark.report import software
from backend.layers.parallel import ParallelContext
from backend.models.loader import load_model
from backend.models.random_weights import SHAPES, write_random_checkpoint
from backend.workspace.convert import convert

TOKENIZER_FOLDER = Path(__file__).resolve().parents[2] / "assets" / "demo_model"


def measured(work: Callable[..., None], *args: Any) -> tuple[float, float]:
    """(seconds of the work itself, GB of memory at its height) in a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, work, args))
    process.start()
    sender.close()
    found = receiver.recv()
    process.join()
    return found


def _run(sender: Any, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")  # its context is no part of the work
    start = time.perf_counter()
    work(*args)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sender.send((seconds, peak / 1e9))


def load(folder: str) -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    load_model(folder, torch.float16 if on_gpu else torch.bfloat16, device, ParallelContext())
    if on_gpu:
        torch.cuda.synchronize()


def make(model: str, workspace: str) -> None:
    convert("random", model, workspace)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-2-7b")
    parser.add_argument("--quantization", choices=("awq",))
    parser.add_argument("--skip-load", action="store_true", help="where memory is too small")
    parser.add_argument("--folder", help="where the files go; they are deleted afterwards")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        model, workspace = os.path.join(place, "model"), os.path.join(place, "workspace")
        start = time.perf_counter()
        write_random_checkpoint(
            model, args.shape, args.quantization, tokenizer_folder=str(TOKENIZER_FOLDER)
        )
        files = [os.path.join(model, name) for name in os.listdir(model)]
        size = sum(map(os.path.getsize, files))
        print(f"# {args.shape} {args.quantization or 'float16'}, {size / 1e9:.2f} GB, written in "
              f"{time.perf_counter() - start:.0f} s; {software()}")  # fmt: skip
        copied = time.perf_counter()
        shutil.copytree(model, os.path.join(place, "copy"))
        os.sync()
        copied = time.perf_counter() - copied
        shutil.rmtree(os.path.join(place, "copy"))
        print("| what | seconds | GB/s | peak memory, GB |\n|---|---|---|---|")
        print(f"| copy of the files, for comparison | {copied:.1f} | {size / copied / 1e9:.2f} | |")
        loads = (
            ("load of the model", load, model),
            ("load of the workspace, the first time", load, workspace),
            ("load of the workspace", load, workspace),
        )
        rows = (("convert", make, model, workspace), *(() if args.skip_load else loads))
        for name, work, *arguments in rows:
            seconds, peak = measured(work, *arguments)
            print(f"| {name} | {seconds:.1f} | {size / seconds / 1e9:.2f} | {peak:.1f} |",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
