"""kill -9 of `python app.py lite ...` in every stage: nothing half, nothing lost, it goes on."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from backend.errors import UserError
from backend.layers.parallel import ParallelContext
from backend.models.loader import load_model
from tests.app_process import BOUND_S, ROOT, environment
from tests.quantization.test_lite_commands import bytes_of
from tests.tiny_model import make_checkpoint

LAYERS = 4
COMMANDS = {
    "auto_awq": ("--w-group-size", "32"),
    "smooth_quant": (),
}


class Job:
    """A lite command as a real process that reports in JSON lines."""

    def __init__(self, home: Path, command: str, source: Path, target: Path) -> None:
        argv = [
            command, source, "--work-dir", target, *COMMANDS[command], "--device", "cpu",
            "--calib-samples", "4", "--calib-seqlen", "64", "--eval-tokens", "2048",
            "--threshold", "100", "--progress", "json",
        ]
        self.process = subprocess.Popen(
            [sys.executable, "app.py", "lite", *map(str, argv)], cwd=ROOT,
            env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        self._too_long = threading.Timer(BOUND_S, self.process.kill)  # nobody waits for ever
        self._too_long.start()
        self.events: list[dict] = []

    def run(self, stage: str = "", done: int = 0) -> int:
        """Its exit code; with `stage` it is killed as soon as that many steps of it are told."""
        assert self.process.stdout is not None and self.process.stderr is not None
        try:
            for line in self.process.stdout:
                event = json.loads(line)
                self.events.append(event)
                if stage and event.get("stage", "").startswith(stage):
                    if event.get("done", 0) >= done:
                        self.process.kill()
                        stage = ""
            errors = self.process.stderr.read()
            code = self.process.wait()
        finally:
            self._too_long.cancel()
        assert code in (0, -signal.SIGKILL), errors
        return code

    def resumed(self) -> int:
        """Blocks that an earlier run had finished, as it says."""
        return next(
            event["done"] for event in self.events
            if event["event"] == "stage" and event["stage"] == "quantize"
        )


def loads(folder: Path) -> bool:
    try:
        load_model(str(folder), torch.float32, torch.device("cpu"), ParallelContext())
    except UserError:
        return False
    return True


def weights(folder: Path) -> dict[str, bytes]:
    return {
        name: data for name, data in bytes_of(folder).items()
        if name.endswith(".safetensors") or name in ("config.json", "tokenizer.json")
    }


@pytest.mark.parametrize("command, seed", [("auto_awq", 1), ("auto_awq", 2), ("smooth_quant", 3)])
def test_killed_in_every_stage(tmp_path, command, seed):
    generator = random.Random(seed)
    source = tmp_path / "model"
    make_checkpoint(source, "llama", num_hidden_layers=LAYERS)
    before = bytes_of(source)
    undisturbed = tmp_path / "undisturbed"
    assert Job(tmp_path, command, source, undisturbed).run() == 0

    target, partial = tmp_path / "target", tmp_path / "target.partial"
    first = generator.randrange(1, LAYERS)
    points = [
        ("check weights", generator.randrange(1, 30)),
        ("quantize", first),
        ("quantize", generator.randrange(first, LAYERS) + 1),
        ("evaluate", generator.randrange(1, 20)),
    ]
    kept = 0
    for stage, done in points:
        job = Job(tmp_path, command, source, target)
        # Where exactly it dies is the machine's choice: some way behind what it told last.
        code = job.run(stage, done)
        assert bytes_of(source) == before
        if code == 0:  # it was faster than the kill
            break
        assert not target.exists()
        if loads(partial):  # no model at all before it is whole
            assert stage != "check weights" and weights(partial) == weights(undisturbed)
        if stage != "check weights":
            assert job.resumed() >= kept
            kept = done if stage == "quantize" else LAYERS
    if code == 0:
        assert weights(target) == weights(undisturbed)
        return
    last = Job(tmp_path, command, source, target)
    assert last.run() == 0
    assert last.resumed() == LAYERS
    assert weights(target) == weights(undisturbed)
    assert json.loads((target / "verdict.json").read_text())["passed"]
    assert not partial.exists() and bytes_of(source) == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("t")) == [
        "target"
    ]
