"""`download`, and ids in place of folders."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import app
from backend.errors import UserError
from backend.hub.errors import OfflineError
from backend.hub.fetch import Progress, fetch
from backend.hub.plan import Hub, make_plan
from backend.hub_commands import Reports, model_folder
from tests.app_process import BOUND_S, ROOT, environment
from tests.hub.conftest import ID, WEIGHTS

BUNDLED = ROOT / "assets" / "demo_model"


@pytest.fixture
def mirror(stand_in, monkeypatch):
    """The environment of somebody who uses a mirror."""
    monkeypatch.setenv("HF_ENDPOINT", stand_in.url)
    return stand_in


def test_download_tells_its_plan_and_prints_the_folder(stand_in, home, capsys):
    words = ["download", ID, "--source", "huggingface", "--endpoint", stand_in.url]
    assert app.main([*words, "--plan"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and not home.exists()
    assert "300.0 kB  model.safetensors" in err and "to fetch into" in err and "free" in err
    assert app.main(words) == 0
    folder = home / "models" / "space" / "tiny-model"
    out, err = capsys.readouterr()
    assert out.split() == [str(folder)] and (folder / "config.json").is_file()
    assert app.main(words) == 0
    assert "all there" in capsys.readouterr()[1]


def test_events_for_the_page(stand_in, capsys):
    words = ["download", ID, "--endpoint", stand_in.url, "--progress", "json"]
    assert app.main(words) == 0
    out, err = capsys.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    assert err == "" and {event["event"] for event in events} == {"plan", "step", "result"}
    plan, *steps, result = events
    assert plan["to_fetch"] == plan["total"] and plan["fits"] and not plan["complete"]
    assert {"path": "model.safetensors", "size": WEIGHTS, "verified": False,
            "partial": 0} in plan["files"]
    assert steps[-1]["done"] == plan["total"] and steps[-1]["eta_s"] == 0
    assert result["folder"] == plan["target"]
    assert app.main(["download", "space/other", *words[2:]]) == 2
    event = json.loads(capsys.readouterr()[0])
    assert event["event"] == "error" and event["code"] == "model_not_found" and event["hint"]


def test_a_long_download_is_a_short_file(capsys):
    now = 0.0
    report = Reports(lambda: now)
    for done in range(1, 10_001):  # a hundred a second
        now += 0.01
        report(Progress("model.safetensors", done, 10_000, 1e6, None))
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert 100 <= len(events) <= 102 and events[-1]["done"] == 10_000


def test_all_flags(stand_in, tmp_path, capsys):
    stand_in.gated.add(ID)
    (tmp_path / "token").write_text(stand_in.token + "\n")
    words = ["download", ID, "--source", "mirror", "--endpoint", stand_in.url]
    assert app.main(words) == 2
    assert "gated" in capsys.readouterr()[1]
    assert app.main([
        *words, "--token_file", str(tmp_path / "token"), "--local_dir", str(tmp_path / "here"),
        "--revision", stand_in.commit(ID), "--include", "*.json", "*.bin", "--exclude", "onnx/*",
    ]) == 0
    assert sorted(path.name for path in (tmp_path / "here").glob("[!.]*")) == [
        "config.json", "pytorch_model.bin", "tokenizer.json"]


@pytest.mark.parametrize("words, complaint", [
    (["nonsense"], "not the id of a model"),
    (["a/b", "--source", "nonsense"], "invalid choice"),
    (["a/b", "--token", "hf_x"], "^lmdesk: Tokens are not taken .* --token-file.$"),
    (["a/b", "--token-file", "/nowhere"], "cannot be read"),
    (["a/b", "--endpoint", "ftp://x"], "http"),
    ([], "required: ID")])
def test_mistakes_are_one_sentence(words, complaint, capsys):
    assert app.main(["download", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and re.search(complaint, err)


def test_an_empty_token_file_is_a_mistake(tmp_path, capsys):
    (tmp_path / "token").write_text("\n")
    assert app.main(["download", ID, "--token-file", str(tmp_path / "token")]) == 2
    assert "is empty" in capsys.readouterr().err


def test_an_id_is_the_downloaded_copy_without_asking_anybody(mirror, capsys):
    folder = model_folder(ID)
    assert Path(folder, "model.safetensors").stat().st_size == WEIGHTS
    assert "to fetch into" in capsys.readouterr().err  # the plan was told before
    mirror.seen.clear()
    assert model_folder(ID) == folder and not mirror.seen


def test_what_is_no_id_stays(mirror, tmp_path, monkeypatch):
    for name in (str(BUNDLED), "./a/b", "../a", "~/models/a", "http://127.0.0.1:23333",
                 "127.0.0.1:23333", "host/x:23333", "a/b/c", "model", "/a/b", ""):
        assert model_folder(name) == name
    (tmp_path / "space" / "tiny-model").mkdir(parents=True)
    (tmp_path / "space" / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_folder(ID) == ID  # a folder comes first
    with pytest.raises(UserError, match="no folder space/tiny-modle.*download space/tiny-modle"):
        model_folder("space/tiny-modle")
    assert not mirror.seen


def test_offline_means_downloaded_models_only(mirror, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OfflineError, match="HF_HUB_OFFLINE is set"):
        model_folder(ID)
    hub = Hub()
    folder = fetch(hub, make_plan(hub, ID))
    assert model_folder(ID) == str(folder)


def test_ids_stand_for_models_in_every_command(mirror, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("quantize.commands._evaluate", lambda args: seen.append(vars(args)) or 0)
    assert app.main(["lite", "evaluate", ID, "--against", ID]) == 0
    assert seen[0]["model"] == seen[0]["against"] == model_folder(ID)
    assert app.main(["chat", "space/other"]) == 2
    assert "has no such model" in capsys.readouterr().err


def test_chat_with_an_id_fetches_the_model_and_talks(mirror, tmp_path, home):
    mirror.models["lmdesk/demo"] = BUNDLED
    done = subprocess.run(
        [sys.executable, "app.py", "chat", "lmdesk/demo", "--inline", "--temperature", "0"],
        cwd=ROOT, env=environment(tmp_path), input="Hello!\n\n", capture_output=True, text=True,
        timeout=BOUND_S)
    assert done.returncode == 0, done.stderr
    assert "lmdesk/demo at" in done.stderr and "tokens" in done.stdout
    assert (home / "models" / "lmdesk" / "demo" / "tokenizer.json").is_file()
