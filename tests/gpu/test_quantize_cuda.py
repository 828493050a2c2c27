"""Quantization on a GPU: the bundled model in 4 and in 8 bits, beside the same made on the CPU."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from backend.tokenizer import Tokenizer
from quantize.auto_awq import auto_awq, observe_moments
from quantize.awq import SearchSettings
from quantize.blocks import BlockModel, linears
from quantize.calibrate import embed_samples
from quantize.data import Samples, load_samples
from quantize.evaluate import EvaluationSettings, evaluate
from quantize.gptq import round_compensated
from quantize.moments import InputMoments, output_loss
from quantize.progress import Progress
from quantize.rtn import GroupFormat, quantize
from quantize.smoothquant import smooth_quant
from tests.gpu.test_engine_cuda import config, replies_of

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo_model"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TOKENS = 4096  # of held-out text


def quiet() -> Progress:
    return Progress("text", stream=open("/dev/null", "w"))


@pytest.fixture(scope="module")
def samples() -> Samples:
    return load_samples("bundled", Tokenizer.from_folder(DEMO), 8, 256)


def make(method: str, target: Path, samples: Samples, device: torch.device, dtype: torch.dtype):
    if method == "awq":
        search = SearchSettings()
        writer = auto_awq(str(DEMO), str(target), samples, search, device, dtype, quiet())
    else:
        writer = smooth_quant(str(DEMO), str(target), samples, device, dtype, quiet())
    return writer.publish()


def divergence(folder: Path) -> float:
    """Mean KL of the original and this, in nats, both on the GPU."""
    settings = EvaluationSettings(tokens=TOKENS, device="cuda")
    verdict = evaluate(str(folder), str(DEMO), settings, quiet())
    assert verdict.comparison is not None
    return verdict.comparison.mean_kl


@pytest.mark.parametrize(("method", "most"), [("awq", 0.06), ("smooth_quant", 0.006)])
def test_the_bundled_model_as_good_as_made_on_the_cpu(tmp_path, samples, method, most):
    """By the verdict's model; and the engine reads the checkpoint too."""
    on_gpu = make(method, tmp_path / "gpu", samples, CUDA, torch.bfloat16)
    on_cpu = make(method, tmp_path / "cpu", samples, CPU, torch.float32)
    names = {path.name for path in on_cpu.glob("*.safetensors")}
    assert names == {path.name for path in on_gpu.glob("*.safetensors")}
    for name in names:
        theirs, ours = load_file(on_cpu / name), load_file(on_gpu / name)
        assert {k: (v.shape, v.dtype) for k, v in theirs.items()} == {
            k: (v.shape, v.dtype) for k, v in ours.items()
        }
    found, expected = divergence(on_gpu), divergence(on_cpu)
    assert found < most and found < 1.1 * expected + 0.001
    settings = config(on_gpu, dtype="auto", session_len=None, max_prefill_token_num=2048)
    assert sum(map(bool, asyncio.run(replies_of(settings)))) >= 3


def test_a_job_on_the_gpu_gives_the_same_bytes_again(tmp_path, samples):
    """A killed job goes on with what it computes anew of the blocks before."""
    first, second = (
        make("awq", tmp_path / name, samples, CUDA, torch.bfloat16) for name in ("a", "b")
    )
    for path in sorted(first.glob("*.safetensors")):
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_moments_are_those_of_float64(dtype):
    x = (torch.randn(3000, 256, device=CUDA) * 3).to(dtype)
    moments = InputMoments(256, CUDA)
    for part in x.split(1024):
        moments.add(part)
    moments.finish()
    exact = x.double().t() @ x.double() / len(x)
    torch.testing.assert_close(moments.gram.double(), exact, rtol=1e-4, atol=1e-4)
    mean = x.double().abs().mean(0)
    torch.testing.assert_close(moments.absmean.double(), mean, rtol=1e-4, atol=0)


def test_errors_of_rounding_told_by_tf32():
    x = torch.randn(4096, 512, device=CUDA) * (1 + 30 * (torch.rand(512, device=CUDA) > 0.98))
    error, gram = torch.randn(96, 512, device=CUDA) * 0.01, x.t() @ x / len(x)
    exact = (error.double() @ gram.double() * error.double()).sum(1)
    for in_float32, tolerance in ((False, 5e-4), (True, 1e-5)):
        told = output_loss(error, gram, in_float32).double()
        torch.testing.assert_close(told, exact, rtol=tolerance, atol=0)


def test_rounding_with_compensation_helps_as_much_as_on_the_cpu():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4096, 64, generator=generator) @ torch.randn(64, 512, generator=generator)
    x += torch.randn(4096, 512, generator=generator) * 0.5
    weight = torch.randn(96, 512, generator=generator) * 0.05
    gram = x.t() @ x / len(x)
    losses = {}
    for device in (CPU, CUDA):
        w, h = weight.to(device), gram.to(device)
        nearest = quantize(w, GroupFormat())
        found = round_compensated(w, h, len(x), nearest, GroupFormat())
        losses[device.type] = [
            float(output_loss(each.dequantize() - w, h, exact=True).sum())
            for each in (nearest, found)
        ]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.01)
    assert losses["cuda"][1] < 0.5 * losses["cuda"][0]
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"  # the engine's sums stay as exact


def test_memory_that_ends_in_the_middle_of_a_batch_is_not_counted(samples, monkeypatch):
    model = BlockModel(DEMO, CUDA, torch.bfloat16)
    block = model.load_block(0)
    hidden, _ = embed_samples(model, samples.ids, quiet().note)
    expected, _ = observe_moments(model, block, hidden, 2, quiet())
    original = BlockModel.run

    def run_small(self, block, hidden):
        output = original(self, block, hidden)
        if len(hidden) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return output

    monkeypatch.setattr(BlockModel, "run", run_small)
    found, size = observe_moments(model, block, hidden, 4, quiet())
    assert size == 2
    for name in linears(block):
        assert found[name].tokens == expected[name].tokens == samples.ids.numel()
        torch.testing.assert_close(found[name].gram, expected[name].gram)
