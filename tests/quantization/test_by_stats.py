"""Checkpoints made by an earlier calibration: nearly as good, and gone on with after a kill."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from backend.errors import UserError
from backend.target import BUNDLED_MODEL
from backend.tokenizer import Tokenizer
from quantize import smoothquant
from quantize.awq import SearchSettings, quantize_block
from quantize.blocks import BlockModel, linears, observed_inputs
from quantize.by_stats import awq_by_stats, moments_of, smooth_quant_by_stats
from quantize.calibrate import CalibrationSettings, LinearObserver, calibrate
from quantize.data import load_samples
from quantize.export import awq_tensors, fill_awq
from quantize.moments import InputMoments
from quantize.progress import Progress
from quantize.rtn import GroupFormat
from quantize.smoothquant import InputSample, fill_int8, int8_tensors
from quantize.stats import CalibrationStats
from tests.quantization.test_auto_awq import digests
from tests.tiny_model import make_checkpoint

DEMO = str(BUNDLED_MODEL)
CPU, FLOAT, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
NEAREST = SearchSettings(scale=False, clip=False, compensate=False)


def quiet() -> Progress:
    return Progress(stream=io.StringIO())


def stats_of(folder, samples: int = 4, seqlen: int = 64) -> CalibrationStats:
    settings = CalibrationSettings(samples=samples, seqlen=seqlen)
    return calibrate(folder, settings, CPU, FLOAT, quiet())


def test_a_block_of_the_bundled_model_is_far_better_than_rounded_to_nearest():
    model = BlockModel(DEMO, CPU)
    ids = load_samples("bundled", Tokenizer.from_folder(DEMO), 8, 128).ids
    hidden = model.embed(ids)
    block = model.load_block(0)
    observers = {name: LinearObserver(1) for name in linears(block)}
    with observed_inputs(block, lambda name, x: observers[name].update(x)):
        exact = model.run(block, hidden)
    stats = {name: observer.stats() for name, observer in observers.items()}

    def error(fill, tensors) -> float:
        changed = model.load_block(0)
        fill(changed, tensors)
        return float((model.run(changed, hidden) - exact).square().mean())

    def awq_error(settings: SearchSettings) -> float:
        moments = {name: moments_of(found, ids.numel(), CPU) for name, found in stats.items()}
        quantized = quantize_block(block, moments, settings, BF16)
        return error(fill_awq, awq_tensors(block, quantized))

    nearest = awq_error(NEAREST)
    assert awq_error(SearchSettings()) < 0.6 * nearest
    samples = {name: InputSample.of_stats(found, CPU) for name, found in stats.items()}
    smoothed = smoothquant.quantize_block(block, samples, BF16)
    assert error(fill_int8, int8_tensors(block, smoothed)) < 0.1 * nearest


def test_moments_are_those_of_the_inputs_but_for_far_channels():
    x = torch.randn(500, 256, generator=torch.Generator().manual_seed(0))
    observer, observed = LinearObserver(1), InputMoments(256, CPU)
    observer.update(x)
    observed.add(x)
    observed.finish()
    found = moments_of(observer.stats(), 500, CPU)
    assert found.tokens == 500
    torch.testing.assert_close(found.absmean, observed.absmean)
    near = torch.block_diag(*[torch.ones(128, 128)] * 2)
    torch.testing.assert_close(found.gram, observed.gram * near, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["awq", "smooth_quant"])
def test_a_job_that_was_ended_goes_on_and_gives_the_same_bytes(tmp_path, method):
    source = tmp_path / "model"
    make_checkpoint(source, "qwen2", num_hidden_layers=3)
    stats = stats_of(source)

    def run(name: str, progress: Progress) -> Path:
        target, rest = str(tmp_path / name), (CPU, FLOAT, progress)
        if method == "awq":
            settings = SearchSettings(GroupFormat(4, 32))
            return awq_by_stats(str(source), target, stats, settings, *rest).publish()
        return smooth_quant_by_stats(str(source), target, stats, *rest).publish()

    class Ends(Progress):
        def step(self, **figures) -> None:
            super().step(**figures)
            if self._done == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("ended", Ends(stream=io.StringIO()))
    assert not (tmp_path / "ended").exists()
    progress = quiet()
    resumed = run("ended", progress)
    assert progress.notes == ["Going on after block 2: an earlier run finished the ones before."]
    assert digests(resumed) == digests(run("whole", quiet()))


def test_a_quantized_model_is_refused(tmp_path):
    source = tmp_path / "model"
    make_checkpoint(source, "llama")
    stats = stats_of(source)
    settings = SearchSettings(GroupFormat(4, 32))
    done = awq_by_stats(str(source), str(tmp_path / "a"), stats, settings, CPU, FLOAT, quiet())
    with pytest.raises(UserError, match="quantized already"):
        awq_by_stats(
            str(done.publish()), str(tmp_path / "b"), stats, settings, CPU, FLOAT, quiet()
        )
