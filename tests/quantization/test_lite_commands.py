"""`python app.py lite ...`: what each command writes, says and refuses."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import app
from backend.errors import UserError
from backend.target import BUNDLED_MODEL
from quantize import data
from quantize.flags import calibration_settings
from tests.tiny_model import make_checkpoint
from tests.unit.test_awq import edit_config, quantize_checkpoint

DEMO = str(BUNDLED_MODEL)
SMALL = ("--calib-samples", "4", "--calib-seqlen", "64", "--device", "cpu")
JUDGED = ("--eval-tokens", "512")
WHOLE = "model.safetensors"
Run = Callable[..., str]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "tiny", "llama", hidden_size=128)
    return tmp_path / "tiny"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a lite command that must fail before any work; returns its one sentence."""

    def run(*argv: str | Path) -> str:
        capfd.readouterr()
        assert app.main(["lite", *map(str, argv)]) == 2
        said = capfd.readouterr()
        assert said.out == ""
        last = said.err.splitlines()[-1]
        assert last.startswith("lmdesk: "), said.err
        return last

    return run


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def events(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


# Command lines


def test_flags_are_those_of_the_tutorials():
    args = app.parse(
        "lite auto_awq M --calib_dataset ptb --calib_samples 128 --calib_seqlen 2048 --work_dir W "
        "--w_bits 4 --w_group_size 64 --w_sym --batch_size 2 --search_scale true --device cpu "
        "--strict_dataset --seed 3 --overwrite".split()
    )
    assert (args.model, args.calib_dataset, args.work_dir) == ("M", "ptb", "W")
    assert (args.w_group_size, args.w_sym, args.search_scale, args.seed) == (64, True, True, 3)
    assert args.strict_dataset and args.overwrite and args.batch_size == 2
    args = app.parse("lite kv_qparams W M --kv-sym True --num-tp 2 --kv-bits 8".split())
    assert (args.stats, args.model, args.kv_sym, args.num_tp) == ("W", "M", True, 2)
    args = app.parse("lite smooth_quant M --work-dir W".split())
    settings = calibration_settings(args)
    assert (settings.samples, settings.seqlen, settings.dataset) == (128, 2048, "bundled")
    args = app.parse("lite calibrate M ".split())
    assert args.progress == "text" and not args.overwrite


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("lite auto_awq M --w-bits 3", "argument --w-bits: invalid choice: 3"),
        ("lite auto_awq M --w-group-size 100", "invalid choice: 100"),
        ("lite auto_awq M --calib-samples 0", "a whole number from 1 expected, not '0'"),
        ("lite auto_awq", "the following arguments are required: MODEL"),
        ("lite quantise M", "invalid choice: 'quantise'"),
        ("lite calibrate M --w-sym", "unrecognized arguments: --w-sym"),
        ("lite evaluate M --threshold much", "argument --threshold: invalid float value: 'much'"),
    ],
)
def test_mistakes_in_the_command_line(line, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        app.parse(line.split())


# Each bad input has its sentence

ALL = ("calibrate", "auto_awq", "smooth_quant")


@pytest.mark.parametrize("command", ALL)
def test_no_such_dataset(refused, here, tiny, command):
    said = refused(command, tiny, *SMALL, "--calib-dataset", "wikitext9")
    assert "no calibration data 'wikitext9'" in said and "bundled, c4, ptb" in said
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("command", ALL)
def test_nan_weights(refused, here, tiny, command):
    tensors = load_file(tiny / WHOLE)
    tensors["model.layers.1.self_attn.k_proj.weight"][0, 0] = math.nan
    save_file(tensors, tiny / WHOLE, metadata={"format": "pt"})
    said = refused(command, tiny, *SMALL)
    assert "model.layers.1.self_attn.k_proj.weight" in said and "NaN or infinity" in said
    assert list(here.iterdir()) == []


def test_auto_awq_writes_judges_and_refuses_to_write_again(here, capfd, refused):
    before = bytes_of(BUNDLED_MODEL)
    argv = ["auto_awq", DEMO, "--calib-samples", "8", "--calib-seqlen", "256", "--device", "cpu"]
    assert app.main(["lite", *argv, "--eval-tokens", "4096"]) == 0
    said = capfd.readouterr().out
    assert "Passed" in said and "Calibrated on the bundled English" in said
    assert said.endswith("\nTry it: python app.py chat demo_model-awq\n")
    assert [path.name for path in here.iterdir()] == ["demo_model-awq"]
    verdict = json.loads((here / "demo_model-awq" / "verdict.json").read_text())
    assert verdict["passed"] and verdict["model"]["model"] == str(here / "demo_model-awq")
    assert verdict["comparison"]["loss"] < 0.05 and verdict["job_seconds"] > 0
    job = json.loads((here / "demo_model-awq" / "quantization_job.json").read_text())
    assert len(job["losses"]) == 5  # one a layer, to plot
    assert "exists already" in refused(*argv)
    assert "is quantized already" in refused("auto_awq", "demo_model-awq")
    assert bytes_of(BUNDLED_MODEL) == before


def test_smooth_quant_writes_and_judges(here, capfd):
    argv = ["smooth_quant", DEMO, "--calib-samples", "4", "--calib-seqlen", "128"]
    assert app.main(["lite", *argv, "--eval-tokens", "2048", "--device", "cpu"]) == 0
    assert "Passed" in capfd.readouterr().out
    verdict = json.loads((here / "demo_model-w8a8" / "verdict.json").read_text())
    assert verdict["comparison"]["loss"] < 0.05
    assert verdict["notes"] == ["Calibrated on the bundled English and Chinese text."]


def test_a_data_set_out_of_reach_is_told_of_or_refused(here, tiny, capfd, refused, monkeypatch):
    def unreachable(name: str, characters: int) -> list[str]:
        raise data.DatasetUnavailable("no network here")

    monkeypatch.setattr(data, "fetch_dataset", unreachable)
    argv = ["auto_awq", str(tiny), *SMALL, *JUDGED, "--calib-dataset", "c4"]
    assert "c4 cannot be had here" in refused(*argv, "--strict-dataset")
    assert list(here.iterdir()) == []
    assert app.main(["lite", *argv, "--threshold", "100", "--progress", "json"]) == 0
    told = events(capfd.readouterr().out)
    note = next(event["text"] for event in told if event["event"] == "note")
    assert "c4 cannot be had here: no network here. Calibrated on the bundled" in note
    assert note in told[-1]["verdict"]["notes"]


def test_a_result_that_failed_is_not_called_by_its_name(here, tiny, capfd):
    argv = ["lite", "auto_awq", str(tiny), *SMALL, *JUDGED, "--threshold", "-10"]
    argv += ["--progress", "json"]
    for name in ("tiny-awq.failed", "tiny-awq.failed-2"):
        assert app.main(argv) == 1
        last = events(capfd.readouterr().out)[-1]
        assert last["path"] == str(here / name) and last["verdict"]["passed"] is False
        assert json.loads((here / name / "verdict.json").read_text())["passed"] is False
    assert not (here / "tiny-awq").exists()


def test_overwrite_replaces_when_the_new_one_is_complete(here, tiny, capfd):
    (here / "out").mkdir()
    (here / "out" / "old").write_text("mine")
    argv = ["lite", "auto_awq", str(tiny), "--w-group-size", "32", "--work-dir", "out", *SMALL]
    # Random weights lose little, and anything is accepted here.
    argv += [*JUDGED, "--threshold", "100", "--w-sym", "--overwrite"]
    assert app.main([*argv, "--strict-dataset"]) == 0
    assert not (here / "out" / "old").exists() and (here / "out" / "config.json").exists()
    assert [path.name for path in here.iterdir()] == ["out"]


def test_a_group_size_that_does_not_divide(refused, here, tmp_path):
    make_checkpoint(tmp_path / "narrow", "llama", hidden_size=64)
    said = refused("auto_awq", tmp_path / "narrow", *SMALL)
    assert "64 inputs, which groups of 128 do not divide" in said
    assert "Use --w-group-size 64" in said
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("command", ALL)
def test_an_unwritable_folder(refused, here, tiny, command):
    (here / "file").write_text("mine")
    said = refused(command, tiny, *SMALL, "--work-dir", here / "file" / "out")
    assert "Nothing can be written to" in said
    assert (here / "file").read_text() == "mine"


@pytest.mark.parametrize("command", ["auto_awq", "smooth_quant"])
def test_an_existing_target(refused, here, tiny, command):
    (here / "out").mkdir()
    (here / "out" / "thesis.txt").write_text("mine")
    said = refused(command, tiny, *SMALL, "--work-dir", here / "out")
    assert "exists already" in said and "--overwrite" in said
    assert bytes_of(here) == {"out/thesis.txt": b"mine"}


@pytest.mark.parametrize("command", ALL)
def test_a_quantized_model(refused, here, tiny, command):
    quantize_checkpoint(tiny)
    assert "is quantized already, by awq" in refused(command, tiny, *SMALL)


@pytest.mark.parametrize("command", (*ALL, "evaluate"))
def test_an_unsupported_architecture(refused, here, tiny, command):
    edit_config(tiny, architectures=["RwkvForCausalLM"])
    said = refused(command, tiny, *(SMALL if command in ALL else ()))
    assert "'RwkvForCausalLM' is not supported" in said and "LlamaForCausalLM" in said


@pytest.mark.parametrize("command", ALL)
def test_the_models_own_folder(refused, tiny, command):
    before = bytes_of(tiny)
    said = refused(command, tiny, *SMALL, "--work-dir", tiny, "--overwrite")
    assert "the model itself is there" in said
    assert bytes_of(tiny) == before


def test_windows_longer_than_the_context(refused, here, tiny):
    said = refused("calibrate", tiny, "--calib-samples", "1", "--calib-seqlen", "512")
    assert "longer than the model's context of 256" in said


# What they write


def test_calibrate_then_kv_qparams(here, tiny, capfd, refused):
    assert app.main(["lite", "calibrate", str(tiny), *SMALL]) == 0
    path = here / "tiny-stats" / "calibration_stats.safetensors"
    assert path.is_file() and str(path) in capfd.readouterr().out
    assert "is there already" in refused("calibrate", tiny, *SMALL)
    assert app.main(["lite", "calibrate", str(tiny), *SMALL, "--overwrite"]) == 0

    served = Path(shutil.copytree(tiny, here / "served"))
    before = bytes_of(served)
    argv = ["kv_qparams", "tiny-stats", str(served), *JUDGED]
    # Three ranks cannot share two heads; nothing is accepted by this threshold.
    assert "tp 3" in refused(*argv, "--num-tp", "3")
    assert app.main(["lite", *argv, "--threshold", "-1"]) == 1
    assert "Nothing was written" in capfd.readouterr().out and bytes_of(served) == before
    assert app.main(["lite", *argv, "--num-tp", "2"]) == 0
    said = capfd.readouterr().out
    assert f"config set {served} kv_cache_dtype=int8" in said
    assert "served, KV in 8 bits" in said and "Passed" in said
    after = bytes_of(served)
    assert set(after) == {*before, "kv_qparams.json"}
    assert "is there already" in refused(*argv)
    assert app.main(["lite", *argv, "--overwrite"]) == 0
    assert "another shape" in refused("kv_qparams", "tiny-stats", DEMO)
    assert "Run lite calibrate first" in refused("kv_qparams", here / "nowhere", served)


@pytest.mark.parametrize("threshold, name", [("100", "work"), ("-10", "work.failed")])
def test_one_folder_for_calibrate_and_auto_awq(here, tiny, threshold, name):
    """As the tutorials have it."""
    assert app.main(["lite", "calibrate", str(tiny), *SMALL, "--work-dir", "work"]) == 0
    stats = bytes_of(here / "work")
    argv = ["lite", "auto_awq", str(tiny), *SMALL, *JUDGED, "--work-dir", "work"]
    assert app.main([*argv, "--threshold", threshold]) == (0 if name == "work" else 1)
    for folder in ("work", name):
        assert stats.items() <= bytes_of(here / folder).items()
    assert (here / name / "verdict.json").exists()
    assert sorted(path.name for path in here.iterdir()) == sorted({"work", name})


def test_the_tutorials_sequence_takes_the_stats_of_calibrate(here, tiny, capfd, refused):
    """`auto_awq` in the folder of `calibrate`, and no flag that asks for another calibration."""
    assert app.main(["lite", "calibrate", str(tiny), *SMALL, "--work_dir", "work"]) == 0
    stats = bytes_of(here / "work")
    argv = ["lite", "auto_awq", str(tiny), "--w_bits", "4", "--w_group_size", "128"]
    argv += ["--work_dir", "work", "--device", "cpu", "--threshold", "100", *JUDGED]
    assert app.main(argv) == 0
    assert "By the stats of that calibration (4 windows of 64 tokens)" in capfd.readouterr().out
    assert stats.items() <= bytes_of(here / "work").items()
    job = json.loads((here / "work" / "quantization_job.json").read_text())
    assert job["stats"]["samples"] == 4 and len(job["losses"]) == 2
    assert [path.name for path in here.iterdir()] == ["work"]

    argv = ["smooth_quant", str(tiny), "--stats", "work", "--device", "cpu"]
    said = refused(*argv, "--calib-samples", "4")
    assert "--calib-samples is for a new calibration" in said
    assert "of another model" in refused("smooth_quant", DEMO, "--stats", "work")
    assert "Run lite calibrate first" in refused("auto_awq", str(tiny), "--stats", "nowhere")
    assert app.main(["lite", *argv, "--threshold", "100", *JUDGED]) == 0
    assert "no text is run again" in capfd.readouterr().out
    assert sorted(path.name for path in here.iterdir()) == ["tiny-w8a8", "work"]


def test_a_quantized_kv_cache_is_measured(here, capfd):
    losses = []
    for bits in ("8", "4"):
        argv = ["evaluate", DEMO, "--against", DEMO, "--quant-policy", bits, "--progress", "json"]
        assert app.main(["lite", *argv, *JUDGED]) in (0, 1)
        losses.append(events(capfd.readouterr().out)[-1]["verdict"]["comparison"]["mean_kl"])
    assert 0 < losses[0] < 0.001 < losses[1] < 0.2


def test_evaluate_says_its_verdict(tiny, capfd):
    assert app.main(["lite", "evaluate", DEMO, "--against", DEMO, *JUDGED]) == 0
    said = capfd.readouterr().out
    assert "Passed: the model is 0.0000 nats" in said and "What is the KV cache?" in said
    # Random weights are not better than chance.
    assert app.main(["lite", "evaluate", str(tiny), *JUDGED, "--progress", "json"]) == 1
    told = events(capfd.readouterr().out)
    assert told[-1]["event"] == "result" and told[-1]["verdict"]["passed"] is False
    assert {"stage", "step", "result"} == {event["event"] for event in told}


def test_an_error_is_an_event_too(here, capfd):
    argv = ["lite", "evaluate", str(here / "nowhere"), "--progress", "json"]
    assert app.main(argv) == 2
    said = capfd.readouterr()
    told = events(said.out)
    assert told[-1]["event"] == "error" and "does not exist" in told[-1]["message"]
    assert said.err.startswith("lmdesk: ")


@pytest.mark.parametrize("command", ["auto_awq", "smooth_quant"])
def test_a_plan_writes_nothing(command, tiny, here, capfd):
    assert app.main(["lite", command, str(tiny), *SMALL, "--plan"]) == 0
    said = capfd.readouterr().out
    assert "for one block at a time" in said and "target   " in said and "cpu, float32" in said
    assert not list(here.iterdir())
    assert app.main(["lite", "evaluate", str(tiny), "--device", "cpu", "--plan"]) == 0
    assert "target" not in capfd.readouterr().out


def test_a_plan_is_refused_as_the_job_would_be(tiny, here, refused):
    (here / "tiny-awq").mkdir()
    (here / "tiny-awq" / "mine").touch()
    assert "exists already" in refused("auto_awq", tiny, *SMALL, "--plan")
