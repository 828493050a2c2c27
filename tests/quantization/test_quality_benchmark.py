"""The quality benchmark's rivals follow their formulas, and its outliers change no function."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from backend.tokenizer import Tokenizer
from quantize.data import load_samples
from quantize.evaluate import EvaluationSettings, evaluate
from quantize.model_run import Window, run_model
from quantize.progress import Progress
from quantize.rtn import GroupFormat
from tests.bench import quality
from tests.bench.quality_methods import LMDEPLOY, METHODS, NAIVE_INT8, Job, lmdeploy_scale
from tests.bench.quality_model import plant_outliers
from tests.tiny_model import make_checkpoint

CPU = torch.device("cpu")
SIZES = dict(hidden_size=128, num_key_value_heads=4)  # V smooths the output projection
FEW = EvaluationSettings(tokens=512, seqlen=64, device="cpu")


def quiet() -> Progress:
    return Progress(stream=io.StringIO())


def test_lmdeploys_scale():
    """s = a**0.5 / w**0.5, w the mean of |W| over its group's largest; max * min of it is 1."""
    form = GroupFormat(group_size=32)
    weight = torch.full((2, 32), 1.0)
    weight[:, 0], weight[1, 1] = 2.0, -2.0  # relative: 1, (0.5 + 1) / 2, 0.5 ...
    absmax = torch.ones(32)
    absmax[2] = 16.0
    raw = absmax.sqrt() / torch.tensor([1.0, 0.75, *[0.5] * 30]).sqrt()
    expected = raw / (raw.max() * raw.min()).sqrt()
    torch.testing.assert_close(lmdeploy_scale([weight[:1], weight[1:]], absmax, form), expected)


@pytest.mark.parametrize("name", [LMDEPLOY, NAIVE_INT8])
def test_rivals_are_whole_checkpoints(tmp_path, name):
    make_checkpoint(tmp_path / "model", "llama", **SIZES)
    source = str(tmp_path / "model")
    samples = load_samples("bundled", Tokenizer.from_folder(source), 2, 32)
    job = Job(source, tmp_path, samples, CPU, torch.float32, quiet())
    method = next(method for method in METHODS if method.name == name)
    folder, form = method.make(job, str(tmp_path / "made"))
    assert form.bits == 16
    verdict = evaluate(folder, source, FEW, quiet())
    assert verdict.comparison is not None and verdict.comparison.mean_kl < 1


def test_planted_outliers_change_nothing(tmp_path: Path):
    make_checkpoint(tmp_path / "model", "llama", **SIZES)
    plant_outliers(tmp_path / "model", tmp_path / "outliers")
    windows = [Window(0, list(range(3, 60)))]
    runs = [
        run_model(str(tmp_path / name), windows, CPU, torch.float32, quiet(), quality.KVFormat())
        for name in ("model", "outliers")
    ]
    torch.testing.assert_close(runs[0].hidden, runs[1].hidden, atol=0.03, rtol=0.03)


def test_texts_are_measured_apart_and_together(tmp_path):
    make_checkpoint(tmp_path / "model", "llama")
    texts = {"one": [Window(0, [3, 4, 5]), Window(0, [6, 7])], "two": [Window(0, [8, 9, 3, 5])]}
    windows = [window for part in texts.values() for window in part]
    folder = str(tmp_path / "model")
    run = run_model(folder, windows, CPU, torch.float32, quiet(), quality.KVFormat())
    sums = quality.measured([run, run], texts, 320, CPU)
    assert [sums[name].counts.tolist() for name in sums] == [[3], [3], [3, 3]]
    assert sums["all documents"].agreed == 6
    assert sums["all documents"].divergence == pytest.approx(0, abs=1e-6)
    both = torch.cat([sums["one"].nats[0], sums["two"].nats[0]])
    torch.testing.assert_close(sums["all documents"].nats[1], both)
