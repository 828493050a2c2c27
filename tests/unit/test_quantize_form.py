"""The quantize tab's form: the command line it amounts to, and what it will take."""

from __future__ import annotations

import asyncio
import stat
import sys
from pathlib import Path

import pytest

from backend.errors import UserError
from backend.model_library import ModelLibrary
from backend.quick_command import QuickCommands
from tests.app_process import ROOT
from ui.quantize_form import MAX_TEXT, QuantizeForm
from ui.quantize_view import plan_html

DEMO = ROOT / "assets" / "demo_model"
FORM = QuantizeForm(str(DEMO), "w4a16", "bundled", 4, 64, "128", 512, "")


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelLibrary:
    monkeypatch.setenv("LMDESK_HOME", str(tmp_path))
    return ModelLibrary(DEMO)


def test_the_command_line(library: ModelLibrary, tmp_path: Path):
    target = tmp_path / "results" / "demo_model-awq"
    assert FORM.argv(library, "en") == [
        "lite", "auto_awq", str(DEMO), "--work-dir", str(target), "--w-group-size", "128",
        "--calib-dataset", "bundled", "--calib-samples", "4", "--calib-seqlen", "64",
        "--eval-tokens", "512"]
    target.mkdir(parents=True)
    assert f"{target}-2" in FORM.argv(library, "en")
    assert "--w-group-size" not in FORM._replace(method="w8a8").argv(library, "en")
    assert FORM._replace(method="kv8").argv(library, "en") == [
        "lite", "evaluate", str(DEMO), "--against", str(DEMO), "--quant-policy", "8",
        "--eval-tokens", "512"]


@pytest.mark.parametrize(("changed", "field"), [
    ({"model": "/etc"}, "model"), ({"model": None}, "model"), ({"method": "x"}, "method"),
    ({"dataset": "../x"}, "calib_dataset"), ({"dataset": []}, "calib_dataset"),
    ({"samples": 0}, "calib_samples"), ({"samples": 1.5}, "calib_samples"),
    ({"seqlen": None}, "calib_seqlen"), ({"seqlen": True}, "calib_seqlen"),
    ({"group_size": "7"}, "w_group_size"), ({"group_size": 128}, "w_group_size"),
    ({"tokens": 1 << 30}, "eval_tokens"), ({"tokens": "9"}, "eval_tokens"),
    ({"dataset": "own", "text": " \n"}, "text"), ({"dataset": "own", "text": 7}, "text"),
    ({"dataset": "own", "text": "a" * (MAX_TEXT + 1)}, "text"),
])
def test_what_a_stranger_may_send(library: ModelLibrary, changed: dict, field: str):
    with pytest.raises(UserError) as caught:
        FORM._replace(**changed).argv(library, "en")
    assert caught.value.field == field


@pytest.mark.parametrize(("text", "suffix"), [
    ("Some text.", ".txt"), ('{"text": "one"}\n{"text": "two"}', ".jsonl"),
    ('{"no": 1}', ".txt"), ("[" * 100_000, ".txt"), ("\ud800", ".txt")])
def test_an_own_text_is_kept_for_the_job_alone(library: ModelLibrary, text: str, suffix: str):
    form = FORM._replace(dataset="own", text=text)
    argv = form.argv(library, "en", write=True)
    path = Path(argv[argv.index("--calib-dataset") + 1])
    assert path.suffix == suffix and path.read_bytes() == text.encode("utf-8", "replace")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert form.argv(library, "en", write=True) == argv
    assert [p.name for p in path.parent.iterdir()] == [path.name]


# What it will take, by the real command


def plan(form: QuantizeForm, library: ModelLibrary) -> dict:
    argv = form.argv(library, "en", write=True)
    return asyncio.run(QuickCommands().ask([*argv, "--plan"]))["plan"]


def test_a_plan(library: ModelLibrary, tmp_path: Path):
    found = plan(FORM, library)
    assert found["target"] == str(tmp_path / "results" / "demo_model-awq")
    assert 0 < found["disk"] < found["source"] and 0 < found["memory"] < found["memory_free"]
    assert not (tmp_path / "results").exists()
    html = plan_html(found, 125.0, "en")
    assert "a block at a time" in html and "2:05 the last time" in html and "awq" in html
    measured = plan(FORM._replace(method="kv8"), library)
    assert measured["target"] is None and "no file is written" in plan_html(measured, None, "en")


def test_refusals_name_the_field(library: ModelLibrary):
    with pytest.raises(UserError, match="too few for one sample of 64") as caught:
        plan(FORM._replace(dataset="own", text="Too short."), library)
    assert caught.value.field == "calib_dataset"
    with pytest.raises(UserError, match="line 2, is no JSON object"):
        plan(FORM._replace(dataset="own", text='{"text": "one"}\nnonsense'), library)


def test_commands_that_say_nothing_or_never_end():
    def ask(script: str, limit_s: float = 60) -> dict:
        return asyncio.run(QuickCommands([sys.executable, "-c", script], limit_s).ask(["x"]))

    with pytest.raises(RuntimeError, match="ended with 3 without a word"):
        ask("import sys; print('noise'); sys.exit(3)")
    with pytest.raises(UserError, match="not answered within"):
        ask("import time; time.sleep(600)", 0.2)
