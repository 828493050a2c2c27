from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stand_in_hub import StandInHub

ID = "space/tiny-model"
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
