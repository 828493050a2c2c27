"""The guide: what its files hold, what follows of them, and a step really measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import app
from backend.errors import UserError
from backend.guide import QUESTIONS, STEPS, Figures, Walk, table
from tests.tiny_model import make_checkpoint

FIGURES = Figures(
    step="fp16", served="/m/model", device="cpu", dtype="float16", quantization="",
    weight_bytes=14 * 10**9, disk_bytes=14 * 10**9, kv_bytes_per_token=524288, kv_bits=16,
    total_bytes=80 * 10**9, ttft_s=0.05, tokens_per_s=40.0, nats=2.0, perplexity=7.4, loss=None,
    passed=True, sentence="Passed.", text="text", replies=("a",) * len(QUESTIONS), options=(),
    created=1.0, seconds=2.0,
)  # fmt: skip


def walked(walk: Walk, **passed: bool) -> None:
    for step, good in passed.items():
        walk.write(replace(FIGURES, step=step, passed=good, served=f"/m/{step}"))


def test_what_is_written_is_read(tmp_path):
    walk = Walk("/m/model", tmp_path)
    assert walk.figures() == {} and walk.recommended() is None and walk.judged() == {}
    walked(walk, w4=True, fp16=True)
    assert list(walk.figures()) == ["fp16", "w4"]  # in the walk's order
    assert Walk("/m/model/", tmp_path).figures()["fp16"] == replace(FIGURES, served="/m/fp16")
    assert Walk("/other/model", tmp_path).figures() == {}
    (walk.folder / "w4.json").write_text('{"step": "w4"}')  # damaged, or of another version
    assert list(walk.figures()) == ["fp16"]


def test_tokens_that_fit():
    assert FIGURES.tokens_fit == int(66 * 10**9 * 0.8) // 524288
    assert replace(FIGURES, total_bytes=10**9).tokens_fit == 0


def test_the_last_step_that_is_good_enough_is_recommended(tmp_path):
    walk = Walk("/m/model", tmp_path)
    walked(walk, fp16=True, kv8=True, w4=False)
    assert walk.recommended().step == "kv8"
    walk.judge("w4", True)  # its user has looked at the answers
    assert walk.recommended().step == "w4"
    walked(walk, both=True)
    assert walk.recommended().step == "both"
    for step in STEPS:
        walk.judge(step, False)
    assert walk.recommended() is None
    with pytest.raises(UserError, match="no step"):
        walk.judge("../fp16", True)


def test_the_command_line_can_be_typed(tmp_path):
    figures = replace(FIGURES, served="/m/a model", options=("--quant-policy", "8"))
    assert figures.serve_command == (
        "python app.py serve api_server '/m/a model' --quant-policy 8")
    assert "fp16" in table([FIGURES]) and "7.400" in table([FIGURES])


def test_a_whole_walk(tmp_path, monkeypatch, capfd):
    """As small as can be: made, judged, served, recommended."""
    monkeypatch.setenv("LMDESK_HOME", str(tmp_path / "home"))
    make_checkpoint(tmp_path / "desk", "llama", hidden_size=128)
    model = str(tmp_path / "desk")
    small = ["--eval-tokens", "512", "--reply-tokens", "8", "--calib-samples", "2",
             "--calib-seqlen", "64", "--device", "cpu"]  # fmt: skip
    assert app.main(["guide", "measure", model, *small]) == 0
    shown = capfd.readouterr().out
    assert "Recommended: python app.py serve api_server" in shown
    found = Walk(model).figures()
    assert list(found) == list(STEPS)
    plain, kv8, w4, both = found.values()
    assert kv8.kv_bits == both.kv_bits == 8
    assert kv8.kv_bytes_per_token < plain.kv_bytes_per_token and kv8.tokens_fit > plain.tokens_fit
    assert w4.quantization == both.quantization == "awq" and w4.disk_bytes < plain.disk_bytes
    assert plain.loss is None and None not in (kv8.loss, w4.loss, both.loss)
    assert abs(kv8.loss) < 0.02 and plain.served == kv8.served == model
    assert kv8.options == ("--quant-policy", "8") and both.served == w4.served
    for figures in found.values():
        assert len(figures.replies) == len(QUESTIONS)
        assert figures.ttft_s > 0 and figures.tokens_per_s > 0 and figures.weight_bytes > 0
    assert Path(w4.served).parent == tmp_path / "home" / "results"
    assert app.main(["guide", "show", model]) == 0
    assert app.main(["guide", "show", str(tmp_path)]) == 2
    assert app.main(["guide", "measure", w4.served, "--step", "fp16"]) == 2  # quantized already
