from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend.hub.errors import DownloadStopped
from backend.hub.fetch import fetch
from backend.hub.plan import Hub, make_plan, part_of
from tests.stand_in_hub import StandInHub

ID = "space/tiny-model"
BIG = "model.safetensors"
WEIGHTS = 300_000  # bytes of model.safetensors
VARIABLES = ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "LMDEPLOY_USE_MODELSCOPE",
             "MODELSCOPE_API_TOKEN")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where downloads go; nothing of the environment speaks."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LMDESK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A model's repository, with the things that are not fetched, too."""
    folder = tmp_path / "repository"
    noise = random.Random(1)
    for name, content in {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b'{"version": "1.0"}',
        "README.md": "\u6a21\u578b\n".encode(),
        "model.safetensors": noise.randbytes(WEIGHTS),
        "pytorch_model.bin": noise.randbytes(1000),
        "modeling.py": b"raise SystemExit",
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "onnx/config.json": b"{}",
        "onnx/model.onnx": noise.randbytes(1000),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


CHOSEN = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]


@pytest.fixture
def stand_in(repository: Path) -> Iterator[StandInHub]:
    with StandInHub({ID: repository}) as hub:
        yield hub


class Pauses(list):
    """Waits for nothing, and remembers for how long it would have."""

    def __call__(self, seconds: float) -> bool:
        self.append(seconds)
        return False


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if path.is_file() and path.name != ".download.json"}


def wanted(repository: Path) -> dict[str, bytes]:
    return {name: (repository / name).read_bytes() for name in CHOSEN}


def stop_midway(stand_in, hub, plan) -> Path:
    """Begin to fetch, and stop inside the weights; returns the part."""
    stand_in.bytes_per_s = 4_000_000
    cancel = threading.Event()

    def report(progress):
        if progress.file == BIG and progress.done > 100_000:
            cancel.set()

    with pytest.raises(DownloadStopped, match="same command goes on"):
        fetch(hub, plan, report, cancel, clock=itertools.count().__next__)  # reports every piece
    stand_in.bytes_per_s = 0
    big = next(planned.file for planned in plan.files if planned.file.path == BIG)
    return part_of(plan.target, big)


@pytest.fixture
def hub(stand_in) -> Hub:
    return Hub("huggingface", stand_in.url)


@pytest.fixture
def plan(hub):
    return make_plan(hub, ID)
