"""kill -9 of `lite auto_awq` at random moments: is anything ever left that should not be?

    python -m tests.bench.lite_kills --kills 200

A job on a tiny model is killed in a random stage, up to 0.2 s after a random step of it; the next
one goes on where that one was, or begins anew. After every kill the source must be the same, a
folder of the target's name must be whole, and what is not whole must not load as a model.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.app_process import ROOT, environment
from tests.quantization.test_kills import LAYERS, loads, weights
from tests.quantization.test_lite_commands import bytes_of
from tests.tiny_model import make_checkpoint

STAGES = ("check weights", "quantize", "quantize", "evaluate", "compare")


def start(home: Path, source: Path, target: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable, "app.py", "lite", "auto_awq", str(source), "--work-dir", str(target),
            "--w-group-size", "32", "--device", "cpu", "--calib-samples", "8",
            "--calib-seqlen", "128", "--eval-tokens", "1024", "--threshold", "100",
            "--progress", "json",
        ],
        cwd=ROOT, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )


def kill(job: subprocess.Popen[str], generator: random.Random) -> int:
    """End it somewhere; its exit code, which is 0 if it was faster."""
    stage, steps = generator.choice(STAGES), generator.randrange(20)
    delay = generator.uniform(0, 0.2)
    assert job.stdout is not None
    for line in job.stdout:
        event = json.loads(line)
        if not event.get("stage", "").startswith(stage):
            continue
        if event["event"] == "step" and event["done"] >= min(steps, event["total"]):
            time.sleep(delay)
            job.kill()
            break
    job.stdout.read()
    return job.wait()


def stage_of(target: Path) -> str:
    """How far the job was, by what lies on the disk."""
    partial = target.with_name(target.name + ".partial")
    if target.exists():
        return "published"
    if not partial.exists():
        return "nothing written"
    if (partial / "config.json").exists():
        return "whole, not judged"
    return f"{len(list(partial.glob('*.safetensors')))} shards"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    generator = random.Random(args.seed)
    seen: Counter[str] = Counter()
    kills = completed = wrong = 0
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        source, target, whole = home / "model", home / "target", home / "undisturbed"
        make_checkpoint(source, "llama", num_hidden_layers=LAYERS)
        before = bytes_of(source)
        undisturbed = start(home, source, whole)
        undisturbed.communicate()
        assert undisturbed.returncode == 0
        expected = weights(whole)
        partial = home / "target.partial"
        while kills < args.kills:
            code = kill(start(home, source, target), generator)
            kills += code != 0
            stage = stage_of(target)
            seen["ended by itself" if code == 0 else stage] += 1
            problems = [
                what for what, holds in {
                    "the source has changed": bytes_of(source) == before,
                    "a published result is not whole":
                        not target.exists() or weights(target) == expected,
                    "half a result loads": not partial.exists() or not loads(partial)
                        or weights(partial) == expected,
                    f"exit code {code}": code in (0, -signal.SIGKILL),
                }.items() if not holds
            ]
            for problem in problems:
                wrong += 1
                print(f"kill {kills}, {stage}: {problem}")
            if target.exists():
                completed += 1
                shutil.rmtree(target)
            elif partial.exists() and generator.random() < 0.3:
                shutil.rmtree(partial)
    for stage, count in sorted(seen.items()):
        print(f"{stage:24} {count}")
    print(f"{kills} kills, {completed} jobs completed, {wrong} things wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
