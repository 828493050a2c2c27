"""convert, config and what names a workspace, as command lines, in the tutorials' spelling too."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import app
from backend.config import EngineConfig
from backend.engine.kv_cache import static_params
from backend.layers.parallel import ParallelContext
from backend.models.registry import read_model_config
from backend.workspace.settings import engine_options
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
    assert "+session_len = 128\n" in said and "cache_chunk_size is without effect" in said
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


@pytest.mark.parametrize("tp", [1, 2])
def test_kv_scales_as_the_tutorials_have_them(model, tmp_path, capfd, monkeypatch, tp):
    monkeypatch.chdir(tmp_path)
    text = ["--calib-samples", "2", "--calib-seqlen", "64", "--device", "cpu"]
    run(capfd, "lite", "calibrate", model, "--work_dir", "./quant_output", *text)
    run(capfd, "convert", "tiny", model, "--tp", tp)
    weights = tmp_path / "workspace" / "triton_models" / "weights"
    said = run(capfd, "lite", "kv_qparams", "./quant_output", "workspace/triton_models/weights/",
               "--kv_sym", "False", "--num_tp", tp, "--device", "cpu", "--eval-tokens", "600",
               "--threshold", "9")  # fmt: skip
    assert ("Passed" if tp == 1 else "Not judged") in said
    assert len(list(weights.glob("layers.*.past_kv_scale.*.weight"))) == 2 * tp
    run(capfd, "config", "set", "workspace", "quant_policy=4")
    config = EngineConfig(model="workspace", **engine_options("workspace", {}))
    params = static_params(config, read_model_config("workspace"), ParallelContext(tp - 1, tp))
    assert params is not None and params.shape == (2, 2, 2 // tp, 2)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["config", "show", "nowhere"], "nowhere is no folder"),
        (["config", "set", "MODEL", "a=b"], "There is no key 'a'"),
        (["config", "set", "MODEL", "kv_cache_gb=1", "kv_cache_tokens=64"], "both given"),
        (["config", "undo", "MODEL"], "no change to settings left"),
        (["config", "verify", "nowhere"], "is no workspace"),
        (["config", "set", "MODEL", "session_len"], "no KEY=VALUE"),
        (["convert", "tiny", "MODEL", "--tp", "0"], "tp must be from 1 to 64"),
        (["convert", "tiny", "MODEL", "--tp", "3"], "tp 3"),
        (["convert", "tiny", "MODEL", "--model-format", "gguf"], "invalid choice"),
        (["convert", "tiny", "./nowhere"], "does not exist"),
        (["convert", "tiny"], "required"),
        (["convert", "MODEL", "tiny"], "The name comes first: convert tiny "),
        (["config", "set", "MODEL", "quant_policy", "=", "4"], "no blanks around the ="),
        (["config", "set", "quant_policy=4", "MODEL"], "The model comes first: config set MODEL q"),
        (["import", "MODEL", "new"], "nothing need be imported"),
    ],
)
def test_bad_command_lines(
    model, tmp_path, tmp_path_factory, capfd, monkeypatch, argv, words
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMDESK_HOME", str(tmp_path_factory.mktemp("home")))
    assert words in refused(capfd, *(word.replace("MODEL", str(model)) for word in argv))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_line_to_try_can_be_pasted(model, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = run(capfd, "convert", "tiny", model, "--dst-path", "中文 路径/工作 区")
    words = shlex.split(said.partition("python app.py ")[2])
    assert words == ["chat", "中文 路径/工作 区"]
    assert "quant_policy" in run(capfd, "config", "show", words[1])


def test_settings_of_a_plain_folder(model, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("LMDESK_HOME", str(tmp_path / "home"))
    said = run(capfd, "config", "set", model, "quant_policy=8", "max_batch_size = 3")
    assert "+quant_policy = 8" in said and "loaded next" in said
    assert "160 bytes a token, 8 bits" in run(capfd, "config", "memory", model, "--device", "cpu")
    said = run(capfd, "config", "memory", model, "--device", "cpu", "--quant-policy", 0)
    assert "bytes a token, 32 bits" in said
    args = app.parse(["chat", str(model), "--inline"])
    services = app.open_services(args)
    assert services.local is not None
    config = services.local.engine.config
    assert (config.kv_cache_bits, config.max_batch_size) == (8, 3)
    services.local.template.close()
    assert "-quant_policy = 8" in run(capfd, "config", "undo", model)
    assert "quant_policy           0 " in run(capfd, "config", "show", model)
