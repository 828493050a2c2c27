"""convert, config and what names a workspace, as command lines, in the tutorials' spelling too."""

from __future__ import annotations

from pathlib import Path

import pytest

import app
from backend.config import EngineConfig
from tests.tiny_model import make_checkpoint


@pytest.fixture
def model(tmp_path) -> Path:
    make_checkpoint(tmp_path / "model", "llama")
    return tmp_path / "model"


def run(capfd, *argv: str | Path) -> str:
    capfd.readouterr()
    code = app.main([str(word) for word in argv])
    said = capfd.readouterr()
    assert code == 0, said.err
    return said.out


def refused(capfd, *argv: str | Path) -> str:
    capfd.readouterr()
    assert app.main([str(word) for word in argv]) == 2
    said = capfd.readouterr()
    assert said.out == "" and said.err.startswith("lmdesk: ")
    return said.err


def test_from_convert_to_what_is_served(model, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = run(capfd, "convert", "internlm-chat-7b", model, "--model_format", "hf", "--tp", 1)
    assert "tp 1" in said and (tmp_path / "workspace" / "manifest.json").is_file()
    said = run(capfd, "convert", "tiny", model, "--dst_path", "./quant", "--overwrite")
    weights = tmp_path / "workspace" / "triton_models" / "weights"
    said = run(capfd, "config", "set", "workspace", "quant_policy=4", "session_len = 128",
               "cache_chunk_size=1")  # fmt: skip
    assert "session_len = 128\n" in said and "cache_chunk_size = 1 (without effect)" in said
    shown = run(capfd, "config", "show", weights, "--max_batch_size", 5).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in shown}
    assert rows["session_len"][:2] == ["128", "config.ini"]
    assert rows["max_batch_size"][:2] == ["5", "--max-batch-size"]
    assert rows["head_num"][:4] == ["4", "config.ini", "fixed:", "the"]
    assert "as convert wrote them" in run(capfd, "config", "verify", "workspace")

    args = app.parse(["chat", "./workspace", "--inline"])
    services = app.open_services(args)
    assert services.local is not None
    config = services.local.engine.config
    assert (config.session_len, config.kv_cache_bits) == (128, 8)
    assert config.model == str(tmp_path / "workspace")
    assert services.local.model_name == "internlm-chat-7b"
    services.local.template.close()
    args = app.parse(["serve", "api_server", "./workspace", "--inline", "--session-len", "64"])
    services = app.open_services(args)
    assert services.local is not None
    assert services.local.engine.config.session_len == 64
    assert services.local.engine.config.max_batch_size == EngineConfig.max_batch_size
    services.local.template.close()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["config", "show", "MODEL"], "is no workspace"),
        (["config", "set", "MODEL", "a=b"], "is no workspace"),
        (["config", "verify", "nowhere"], "is no workspace"),
        (["config", "set", "MODEL", "session_len"], "no KEY=VALUE"),
        (["convert", "tiny", "MODEL", "--tp", "0"], "tp must be from 1 to 64"),
        (["convert", "tiny", "MODEL", "--tp", "3"], "tp 3"),
        (["convert", "tiny", "MODEL", "--model-format", "gguf"], "invalid choice"),
        (["convert", "tiny", "./nowhere"], "does not exist"),
        (["convert", "tiny"], "required"),
        (["import", "MODEL", "new"], "nothing need be imported"),
    ],
)
def test_bad_command_lines(model, tmp_path, capfd, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capfd, *(word.replace("MODEL", str(model)) for word in argv))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
