"""Bad inputs: each has its one sentence, told before any work."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from backend.errors import UserError
from backend.models.random_weights import SHAPES
from backend.models.registry import read_model_config
from backend.target import BUNDLED_MODEL
from quantize import preflight
from quantize.progress import Progress, duration
from tests.tiny_model import FAMILIES, make_checkpoint
from tests.unit.test_awq import edit_config, quantize_checkpoint

DEMO = str(BUNDLED_MODEL)
WHOLE = "model.safetensors"


def quiet() -> Progress:
    return Progress(stream=io.StringIO())


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "tiny", "llama")
    return tmp_path / "tiny"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes(tmp_path, family):
    make_checkpoint(tmp_path / "m", family)
    source = preflight.check_source(str(tmp_path / "m"))
    assert len(source.linears) == 2 * 7  # q k v o gate up down of both layers
    preflight.check_group_size(source, 32)
    preflight.check_finite(source, quiet())


def test_the_bundled_model_passes(tmp_path):
    source = preflight.check_source(DEMO)
    preflight.check_group_size(source, 128)
    preflight.check_finite(source, quiet())
    preflight.check_target(str(tmp_path / "new" / "deeper"), DEMO, False)
    preflight.check_space(str(tmp_path / "new"), source.bytes_of(4.25))
    needed = preflight.memory_needed(source.config, 2048, torch.float32)
    preflight.check_memory(torch.device("cpu"), needed)
    assert list(tmp_path.iterdir()) == []  # it only looked


def test_bytes_are_those_of_a_real_4_bit_checkpoint(tiny):
    source = preflight.check_source(str(tiny))
    quantize_checkpoint(tiny)
    stored = sum(t.nbytes for t in load_file(tiny / WHOLE).values())
    assert source.bytes_of(4 + (16 + 4) / 32) == stored


@pytest.mark.parametrize("config", [True, False], ids=["config", "v0.2.4"])
def test_a_quantized_model_is_refused(tiny, config):
    quantize_checkpoint(tiny)
    if not config:
        edit_config(tiny, quantization_config=None)
    with pytest.raises(UserError, match="is quantized already, by awq"):
        preflight.check_source(str(tiny))


def test_an_unknown_method_is_refused(tiny):
    edit_config(tiny, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    with pytest.raises(UserError, match="quantized with the method 'gptq'"):
        preflight.check_source(str(tiny))


def test_an_unsupported_architecture_is_refused(tiny):
    edit_config(tiny, architectures=["MambaForCausalLM"])
    with pytest.raises(UserError, match="'MambaForCausalLM' is not supported"):
        preflight.check_source(str(tiny))


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        preflight.check_source(str(tmp_path / "nowhere"))


def test_a_group_size_that_does_not_divide_is_refused_with_one_that_does(tiny):
    source = preflight.check_source(str(tiny))
    with pytest.raises(UserError, match="64 inputs, which groups of 128 do not divide") as caught:
        preflight.check_group_size(source, 128)
    assert caught.value.hint == "Use --w-group-size 64."


def test_no_group_size_divides(tmp_path):
    make_checkpoint(tmp_path / "m", "llama", intermediate_size=72)
    source = preflight.check_source(str(tmp_path / "m"))
    with pytest.raises(UserError, match="72 inputs") as caught:
        preflight.check_group_size(source, 64)
    assert "stays as it is" in caught.value.hint


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused(tiny, value):
    tensors = load_file(tiny / WHOLE)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, tiny / WHOLE, metadata={"format": "pt"})
    source = preflight.check_source(str(tiny))
    with pytest.raises(UserError, match="layers.1.mlp.up_proj.weight in .* contains NaN or inf"):
        preflight.check_finite(source, quiet())


def test_an_existing_target_is_refused_or_overwritten(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    preflight.check_target(str(target), DEMO, False)  # empty: nothing is lost
    (target / "kept").write_text("mine")
    with pytest.raises(UserError, match="exists already") as caught:
        preflight.check_target(str(target), DEMO, False)
    assert "--overwrite" in caught.value.hint
    preflight.check_target(str(target), DEMO, True)
    assert (target / "kept").read_text() == "mine"


def test_a_file_as_target_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file, not a folder"):
        preflight.check_target(str(tmp_path / "file"), DEMO, True)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="Nothing can be written to"):
        preflight.check_target(str(tmp_path / "file" / "out"), DEMO, False)
    with pytest.raises(UserError, match="Nothing can be written to /proc"):
        preflight.check_target("/proc/out", DEMO, False)


@pytest.mark.parametrize("where", [".", "inside", ".."])
def test_the_models_own_folder_is_never_a_target(tiny, where):
    with pytest.raises(UserError, match="the model itself is there"):
        preflight.check_target(str(tiny / where), str(tiny), True)
    os.symlink(tiny, tiny.parent / "alias")
    with pytest.raises(UserError, match="the model itself is there"):
        preflight.check_target(str(tiny.parent / "alias"), str(tiny), True)


def test_a_full_disk_is_refused(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(UserError, match="of disk space"):
        preflight.check_space(str(tmp_path / "out"), free)


def test_memory_of_a_7b_block(tmp_path):
    """A job of this shape was seen to hold 8.1 GB of an H200, activations of 8192 tokens included.

    A check that asks for less lets it fail in its third minute, one for much more refuses GPUs that
    would do.
    """
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["llama-2-7b"]))
    config = read_model_config(str(tmp_path))
    assert 4e9 < preflight.memory_needed(config, 2048, torch.float16) < 8.1e9


def test_too_little_memory_is_refused():
    with pytest.raises(UserError, match="One block of this model needs about"):
        preflight.check_memory(torch.device("cpu"), 1 << 50)


# Progress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_progress_as_json_lines():
    stream, clock = io.StringIO(), Clock()
    progress = Progress("json", stream, clock)
    progress.stage("quantize", 5, done=1)  # an earlier run did the first
    clock.now += 2
    progress.step(loss=math.nan, block=1)
    progress.note("a note")
    progress.result({"passed": True}, "not in JSON")
    progress.error(UserError("What.", "Why."))
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [e.pop("event") for e in events] == ["stage", "step", "note", "result", "error"]
    assert events[0] == {"elapsed_s": 0.0, "stage": "quantize", "total": 5, "done": 1}
    assert events[1] == {
        "elapsed_s": 2.0, "stage": "quantize", "done": 2, "total": 5, "eta_s": 6.0, "loss": None,
        "block": 1,
    }
    assert events[3]["passed"] is True
    assert (events[4]["message"], events[4]["hint"]) == ("What.", "Why.")


def test_progress_in_a_log_is_few_lines():
    stream, clock = io.StringIO(), Clock()
    progress = Progress("text", stream, clock)
    progress.stage("evaluate", 100)
    for _ in range(100):
        clock.now += 0.5
        progress.step()
    lines = stream.getvalue().splitlines()
    assert 4 <= len(lines) <= 7 and lines[-1] == "evaluate 100/100"
    assert lines[0] == "evaluate 1/100  about 50 s left"


def test_durations_for_people():
    said = [duration(seconds) for seconds in (0.2, 59.4, 200, 7500)]
    assert said == ["0 s", "59 s", "3 min 20 s", "2 h 5 min"]
