"""int8 checkpoints in the engine: against the same arithmetic in transformers' model, and refusals.

The second reader here knows the format only: `weight` int8 [out, in] times `scale` [out, 1], and
inputs rounded to whole numbers whose largest, of each token, is 127.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from backend.config import EngineConfig, SamplingParams
from backend.engine.types import Request
from backend.engine.worker import build_engine
from backend.errors import UserError
from backend.layers.parallel import ParallelContext
from backend.models.loader import build_model, check_dtype, load_model
from backend.models.registry import read_model_config
from backend.tokenizer import Tokenizer
from quantize.data import load_samples
from quantize.progress import Progress
from quantize.smoothquant import smooth_quant
from tests.parity.test_logits import ids_of, paged_logits
from tests.tiny_model import make_checkpoint
from tests.unit.test_awq import edit_config

CPU = torch.device("cpu")
DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo_model"
CASES = {
    "llama_mha_biases": (
        "llama", dict(num_key_value_heads=4, attention_bias=True, mlp_bias=True)
    ),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}  # fmt: skip


def quantized(source: Path, target: Path, samples: int = 4, seqlen: int = 48) -> Path:
    text = load_samples("bundled", Tokenizer.from_folder(source), samples, seqlen)
    writer = smooth_quant(str(source), str(target), text, CPU, torch.float32, Progress())
    return writer.publish()


def stored(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


class Int8Linear(nn.Module):
    """Whole numbers times whole numbers, summed exactly in float64."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.scale, self.bias = weight.double(), scale, bias

    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        product = torch.round(x / step).double() @ self.weight.t()
        product = product.float() * step * self.scale[:, 0]
        return product if self.bias is None else product + self.bias


def second_reader(folder: Path) -> nn.Module:
    """transformers' float model of the folder, its decoder's linears replaced."""
    tensors = {
        name: tensor if tensor.dtype == torch.int8 else tensor.float()
        for name, tensor in stored(folder).items()
    }
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = None
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and f"{name}.scale" in tensors:
            parts = [tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.scale")]
            linear = Int8Linear(*parts, tensors.pop(f"{name}.bias", None))
            model.set_submodule(name, linear)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied
    model.tie_weights()
    return model


@pytest.mark.parametrize("name", CASES)
def test_logits_of_the_same_arithmetic(tmp_path, name):
    family, overrides = CASES[name]
    make_checkpoint(tmp_path / "plain", family, **overrides)
    folder = quantized(tmp_path / "plain", tmp_path / "int8")
    assert sum(t.dtype == torch.int8 for t in stored(folder).values()) == 2 * 7
    ids = ids_of(50)
    logits = paged_logits(folder, ids, [37, *range(38, 51)], scattered=True)
    with torch.inference_mode():
        expected = second_reader(folder)(ids[None]).logits[0]
    # Where a last bit of float32 turns a rounding over, 1 / 127 of a token's largest input moves.
    torch.testing.assert_close(logits, expected, atol=2e-2, rtol=0)
    assert float((logits - expected).abs().median()) < 1e-5


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return quantized(DEMO, tmp_path_factory.mktemp("demo") / "demo-w8a8", 8, 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_near_the_float_model(demo, dtype):
    """The bundled model: what it says of text it was trained for."""
    text = torch.tensor([300 + 7 * i + j for i in range(6) for j in range(16)])
    cuts = [64, 95, 96]
    exact = paged_logits(DEMO, text, cuts, scattered=False).log_softmax(-1)
    found = paged_logits(demo, text, cuts, scattered=False, dtype=dtype).log_softmax(-1)
    divergence = (exact.exp() * (exact - found)).sum(-1).mean()
    assert 0 < float(divergence) < 0.02


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_engine_runs_it(demo, kernels):
    engine = build_engine(
        EngineConfig(
            model=str(demo), dtype="bfloat16", device="cpu", session_len=128, quant_policy=8,
            kernels=kernels,
        )  # fmt: skip
    )
    assert engine.runner.info.quantization == "smooth_quant"
    plain, _ = load_model(str(DEMO), torch.bfloat16, CPU, ParallelContext())
    assert engine.runner.info.weight_bytes < 0.8 * plain.weight_bytes()
    sampling = SamplingParams(temperature=0.0, max_tokens=12)
    engine.add_request(Request("0", list(range(300, 340)), sampling))
    tokens = []
    while engine.has_work():
        tokens += [token for output in engine.step() for token in output.token_ids]
    assert len(tokens) == 12


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_checkpoint(folder / "plain", "llama")
    return quantized(folder / "plain", folder / "int8")


def test_each_rank_loads_its_part(made):
    tensors = stored(made)
    for rank in range(2):
        decoder, _ = load_model(str(made), torch.float32, CPU, ParallelContext(rank, 2))
        layer = decoder.layers[1]
        half = slice(64 * rank, 64 * rank + 64)
        up = tensors["model.layers.1.mlp.up_proj.scale"][half, 0]
        assert torch.equal(layer.mlp.gate_up_proj.scales[64:], up)
        down = tensors["model.layers.1.mlp.down_proj.scale"][:, 0]
        assert torch.equal(layer.mlp.down_proj.scales, down)
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
        weight = tensors["model.layers.1.mlp.down_proj.weight"][:, half]
        expected = Int8Linear(weight, down[:, None], None)(x)
        found = layer.mlp.down_proj.method.apply(layer.mlp.down_proj, x, None)
        torch.testing.assert_close(found, expected)


def test_random_weights(made):
    config = read_model_config(str(made))
    check_dtype(config, torch.float32, torch.device("cuda"))  # int8 kernels take any
    decoders = [build_model(config, torch.float32, CPU, ParallelContext(), s) for s in (1, 1, 2)]
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    first, second, other = (decoder.layers[0].mlp.gate_up_proj(x) for decoder in decoders)
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert 0.1 < float(first.std()) < 0.25  # 0.02 times the root of 64 inputs


def copied(made: Path, folder: Path, tensors: dict[str, Tensor]) -> str:
    folder.mkdir()
    for path in made.iterdir():
        if path.suffix == ".json" and "index" not in path.name:
            (folder / path.name).write_bytes(path.read_bytes())
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def test_weights_that_are_no_whole_numbers(made, tmp_path):
    tensors, name = stored(made), "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].float()
    folder = copied(made, tmp_path / "x", tensors)
    with pytest.raises(UserError, match=f"{name} is stored as F32, not as I8"):
        load_model(folder, torch.float32, CPU, ParallelContext())


def test_scales_that_are_missing_or_no_numbers(made, tmp_path):
    tensors, name = stored(made), "model.layers.0.mlp.up_proj.scale"
    scale = tensors.pop(name)
    folder = copied(made, tmp_path / "x", tensors)
    with pytest.raises(UserError, match=f"lacks the tensor {name}"):
        load_model(folder, torch.float32, CPU, ParallelContext())
    folder = copied(made, tmp_path / "y", {**tensors, name: scale * torch.nan})
    with pytest.raises(UserError, match=f"{name} contains NaN"):
        load_model(folder, torch.float32, CPU, ParallelContext())


def test_another_number_format(made, tmp_path):
    folder = copied(made, tmp_path / "x", stored(made))
    wanted = {"quant_method": "smooth_quant", "quant_dtype": "float8_e4m3fn"}
    edit_config(Path(folder), quantization_config=wanted)
    with pytest.raises(UserError, match="quant_dtype 'float8_e4m3fn', which is not supported"):
        read_model_config(folder)
