"""A whole `lite auto_awq` job on a model of a real shape with random weights: time and memory.

    python -m tests.bench.quantize_job --random-weights llama-2-7b [--layers 8 32]
        [--method smooth_quant]

The job is the very command of a user, in a child process, with 128 windows of 2048 tokens of the
bundled text by the bundled tokenizer. Its verdict is taken and timed, and its threshold left out: a
random model's text means nothing. With --layers the shape has fewer decoder layers; two such runs
give what a layer costs, and so what a model of any number of them will.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from backend.models.random_weights import SHAPES, write_random_checkpoint
from quantize.verdict import size
from tests.app_process import ROOT

DEMO = ROOT / "assets" / "demo_model"
POLL_S = 0.2


def checkpoint(shape: str, layers: int | None, dtype: str, folder: Path) -> Path:
    """The model to quantize, written if it is not there yet."""
    name = shape
    if layers is not None:
        name = f"{shape}-{layers}-layers"
        SHAPES[name] = {**SHAPES[shape], "num_hidden_layers": layers}
    path = folder / name
    write_random_checkpoint(str(path), name, None, dtype, tokenizer_folder=str(DEMO))
    return path


class Resident(threading.Thread):
    """Largest resident memory of a process and its children, looked at now and then."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process = psutil.Process(pid)
        self.peak = self.peak_own = 0

    def run(self) -> None:
        while True:
            try:
                family = [self.process, *self.process.children(recursive=True)]
                infos = [one.memory_info() for one in family]
            except psutil.Error:
                return
            self.peak = max(self.peak, sum(info.rss for info in infos))
            own = sum(info.rss - getattr(info, "shared", 0) for info in infos)
            self.peak_own = max(self.peak_own, own)
            time.sleep(POLL_S)


def run_job(source: Path, target: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The job's result event, with what was seen of it from outside.

    Raises:
        SystemExit: it ended without a result; its own words were printed.
    """
    command = [
        sys.executable, "app.py", "lite", args.method, str(source), "--work-dir", str(target),
        "--overwrite", "--calib-samples", str(args.samples), "--calib-seqlen", str(args.seqlen),
        "--eval-tokens", str(args.eval_tokens), "--threshold", "1e9", "--device", args.device,
        "--progress", "json",
    ]  # fmt: skip
    start = time.monotonic()
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    watch = Resident(job.pid)
    watch.start()
    result: dict[str, Any] | None = None
    assert job.stdout is not None
    for line in job.stdout:
        event = json.loads(line)
        if event["event"] == "result":
            result = event
        elif event["event"] in ("note", "error") or event.get("done") == event.get("total"):
            print("  ", {k: v for k, v in event.items() if k != "notes"}, flush=True)
        elif event["event"] == "step" and event["stage"] == "quantize":
            print(f"   {event['elapsed_s']:7.1f} s: block {event['done']}", flush=True)
    code = job.wait()
    if result is None:
        raise SystemExit(f"the job ended with exit code {code} and no result")
    result |= {
        "wall_s": time.monotonic() - start, "rss": watch.peak, "rss_own": watch.peak_own,
        "written": sum(p.stat().st_size for p in Path(result["path"]).rglob("*") if p.is_file()),
    }  # fmt: skip
    return result


def report(source: Path, result: dict[str, Any], args: argparse.Namespace) -> str:
    """The table."""
    verdict = result["verdict"]
    stages = verdict["stages"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    peak = verdict["peak_memory"]
    gpu = "" if peak["gpu"] is None else f"{size(peak['gpu'])} on the GPU, "
    rows = [f"| {name} | {seconds:.1f} |" for name, seconds in stages.items()]
    return "\n".join([
        f"{args.method} of {source.name}, {args.samples} x {args.seqlen} tokens, on {device}",
        "| stage | s |", "|---|---|", *rows,
        f"| all of it, in the child | {sum(stages.values()):.1f} |",
        f"| with the start of the process | {result['wall_s']:.1f} |",
        "",
        f"peak memory: {gpu}{size(peak['host'])} resident on the host, mapped files included; "
        f"seen from outside {size(result['rss'])}, without shared pages {size(result['rss_own'])}",
        f"written: {size(result['written'])}, of {size(verdict['against']['disk_bytes'])}",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--random-weights", choices=list(SHAPES), default="llama-2-7b")
    parser.add_argument("--random-weights-dir", type=Path, metavar="DIR", help="kept there")
    parser.add_argument("--layers", type=int, nargs="*", metavar="N", help="one run for each")
    parser.add_argument("--method", choices=("auto_awq", "smooth_quant"), default="auto_awq")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--eval-tokens", type=int, default=32768)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        folder = args.random_weights_dir or Path(home)
        folder.mkdir(parents=True, exist_ok=True)
        tables = []
        for layers in args.layers or [None]:
            start = time.monotonic()
            source = checkpoint(args.random_weights, layers, args.dtype, folder)
            print(f"{source.name}: written in {time.monotonic() - start:.1f} s", flush=True)
            result = run_job(source, folder / f"{source.name}-out", args)
            shutil.rmtree(result["path"])
            tables.append(report(source, result, args))
            print(tables[-1], flush=True)
        if len(tables) > 1:
            print("\n\n".join(["", *tables]))


if __name__ == "__main__":
    main()
