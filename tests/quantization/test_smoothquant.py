"""Smoothing and rounding to 8 bits: what is stored, what it means, and that the search pays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from backend.errors import UserError
from backend.layers.parallel import ParallelContext
from backend.models.decoder import DecoderLayer
from backend.models.loader import load_model
from backend.models.registry import read_model_config
from backend.tokenizer import Tokenizer
from kernels import ops
from quantize.blocks import BlockModel, linears, observed_inputs
from quantize.data import load_samples
from quantize.export import CheckpointWriter
from quantize.progress import Progress
from quantize.smoothquant import (
    InputSample,
    fill_int8,
    int8_tensors,
    product_loss,
    quantize_block,
    round_rows,
    search_scale,
    smooth_quant,
)
from tests.tiny_model import make_checkpoint
from tests.unit.test_awq import edit_config

CPU = torch.device("cpu")
BATCH, LENGTH = 3, 40


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sampled(model: BlockModel, block: DecoderLayer, hidden: Tensor) -> dict[str, InputSample]:
    total = hidden.shape[0] * hidden.shape[1]
    samples = {
        name: InputSample(layer.in_features, total, CPU) for name, layer in linears(block).items()
    }
    with observed_inputs(block, lambda name, x: samples[name].add(x)):
        model.run(block, hidden)
    return samples


def prepared(folder: Path) -> tuple[BlockModel, DecoderLayer, Tensor, dict[str, InputSample]]:
    model = BlockModel(folder, CPU)
    block = model.load_block(0)
    ids = torch.randint(0, 256, (BATCH, LENGTH), generator=torch.Generator().manual_seed(4))
    hidden = model.embed(ids)
    return model, block, hidden, sampled(model, block, hidden)


def test_rows_in_8_bits():
    weight = random(6, 40)
    weight[2] = 0
    stored = round_rows(weight)
    assert stored.qweight.dtype == torch.int8 and stored.scales.dtype == torch.float32
    assert stored.qweight.abs().amax(-1).tolist() == [127, 127, 0, 127, 127, 127]
    error = stored.qweight * stored.scales[:, None] - weight
    assert bool((error.abs() <= 0.501 * stored.scales[:, None]).all())


def test_a_sample_is_spread_over_all_tokens():
    sample, x = InputSample(4, 3 * 2000, CPU), random(6000, 4)
    for part in x.split(700):
        sample.add(part)
    assert torch.equal(sample.absmax, x.abs().amax(0))
    stride = 6000 // 512 | 1
    assert torch.equal(sample.tokens, x[::stride])


def test_the_loss_is_that_of_the_op():
    weight, tokens, scale = random(24, 32), random(10, 32, seed=1), random(32, seed=2).exp()
    product = ops.linear_w8(tokens / scale, round_rows(weight * scale), None)
    exact = tokens @ weight.t()
    expected = float((product - exact).square().sum())
    assert product_loss(weight, tokens, scale, exact) == pytest.approx(expected, rel=1e-3)


def test_outliers_are_moved_into_the_weights():
    weight, tokens = random(48, 64), random(200, 64, seed=1)
    tokens[:, 5] *= 60
    weight[:, 5] /= 60
    sample = InputSample(64, 200, CPU)
    sample.add(tokens)
    scale, strength = search_scale(weight, sample)
    assert strength is not None and float(scale[5]) > 10 * float(scale.median())
    exact = tokens @ weight.t()
    naive = product_loss(weight, tokens, torch.ones(64), exact)
    assert product_loss(weight, tokens, scale, exact) < naive / 25


def test_no_smoothing_where_it_does_not_help():
    """Tokens that 8 bits express exactly, weights too."""
    weight = torch.randint(-127, 128, (8, 16), generator=torch.Generator().manual_seed(0)).float()
    tokens = torch.randint(-127, 128, (8, 16), generator=torch.Generator().manual_seed(1)).float()
    weight[:, 0] = tokens[:, 0] = 127
    sample = InputSample(16, 8, CPU)
    sample.add(tokens)
    scale, strength = search_scale(weight, sample)
    assert strength is None and torch.equal(scale, torch.ones(16))


# llama: V's rows smooth the output projection only where each query head has its own.
@pytest.mark.parametrize(
    ("family", "overrides", "groups"),
    [
        ("llama", dict(num_key_value_heads=4, attention_bias=True, mlp_bias=True), 4),
        ("qwen2", {}, 3),
        ("qwen3", {}, 3),
    ],
    ids=["llama_mha_biases", "qwen2", "qwen3"],
)
def test_smoothing_alone_changes_nothing(tmp_path, family, overrides, groups):
    """The new norms and weights, not rounded, are the old block; rounded, they are near it."""
    make_checkpoint(tmp_path, family, **overrides)
    model, block, hidden, samples = prepared(tmp_path)
    expected = model.run(block, hidden)
    before = {name: p.clone() for name, p in block.named_parameters()}
    smoothed = quantize_block(block, samples, torch.bfloat16)
    assert len(smoothed.strengths) == groups
    assert all(torch.equal(p, before[name]) for name, p in block.named_parameters())
    assert all(norm.dtype == torch.bfloat16 for norm in smoothed.norms.values())
    fill_int8(block, int8_tensors(block, smoothed))
    error = (model.run(block, hidden) - expected).norm() / expected.norm()
    assert 0 < float(error) < 0.05


def test_losses_are_of_the_rounded_product(tmp_path):
    make_checkpoint(tmp_path, "llama")
    _, block, _, samples = prepared(tmp_path)
    naive = quantize_block(block, samples, torch.float32, smooth=False)
    assert naive.strengths == {}
    layer, tokens = block.self_attn.qkv_proj, samples["self_attn.qkv_proj"].tokens
    exact = tokens @ layer.weight.t()
    product = ops.linear_w8(tokens, naive.linears["self_attn.qkv_proj"], None)
    expected = float((product - exact).square().sum() / exact.square().sum())
    assert naive.losses["self_attn.qkv_proj"] == pytest.approx(expected, rel=1e-3)
    smoothed = quantize_block(block, samples, torch.float32)
    assert all(smoothed.losses[name] <= naive.losses[name] * 1.001 for name in naive.losses)


def test_planted_outliers(tmp_path):
    """Channels of a norm 40 times as large, their weights as much smaller: the same function."""
    make_checkpoint(tmp_path, "llama")
    model, block, hidden, _ = prepared(tmp_path)
    expected = model.run(block, hidden)
    for norm, layer in (
        (block.input_layernorm, block.self_attn.qkv_proj),
        (block.post_attention_layernorm, block.mlp.gate_up_proj),
    ):
        norm.weight.data[7:9] *= 40
        layer.weight.data[:, 7:9] /= 40
    torch.testing.assert_close(model.run(block, hidden), expected, atol=1e-3, rtol=1e-4)
    samples = sampled(model, block, hidden)
    errors = []
    for smooth in (False, True):
        made = BlockModel(tmp_path, CPU).load_block(0)
        made.load_state_dict(block.state_dict())
        smoothed = quantize_block(made, samples, torch.bfloat16, smooth)
        fill_int8(made, int8_tensors(made, smoothed))
        errors.append(float((model.run(made, hidden) - expected).square().mean()))
    assert errors[1] < errors[0] / 5


def job(source: Path, target: Path, seed: int = 0) -> CheckpointWriter:
    samples = load_samples("bundled", Tokenizer.from_folder(source), 3, 40, seed=seed)
    return smooth_quant(str(source), str(target), samples, CPU, torch.float32, Progress())


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """(Two files of the same tensors may differ: their metadata have no order.)"""
    found = {}
    for path in folder.glob("*.safetensors"):
        found.update(load_file(path))
    return found


def same(first: Path, second: Path) -> bool:
    one, other = tensors_of(first), tensors_of(second)
    kept = [{p.name: p.read_bytes() for p in f.glob("*.json")} for f in (first, second)]
    equal = all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    return one.keys() == other.keys() and equal and kept[0] == kept[1]


@pytest.fixture
def source(tmp_path) -> Path:
    make_checkpoint(tmp_path / "model", "llama")
    return tmp_path / "model"


def test_a_job_writes_lmdeploys_names(source, tmp_path):
    before = files_of(source)
    folder = job(source, tmp_path / "int8").publish()
    assert files_of(source) == before
    tensors = load_file(folder / "model-00002-of-00003.safetensors")
    prefix = "model.layers.0.self_attn.k_proj"
    assert tensors[f"{prefix}.weight"].dtype == torch.int8
    assert tensors[f"{prefix}.weight"].shape == (32, 64)
    assert tensors[f"{prefix}.scale"].shape == (32, 1)
    assert tensors[f"{prefix}.scale"].dtype == torch.float32
    config = read_model_config(str(folder))
    assert config.quantization is not None and config.quantization.method == "smooth_quant"
    plain = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    others = load_file(folder / "model-00001-of-00003.safetensors")
    assert torch.equal(others["model.embed_tokens.weight"], plain)


def test_a_killed_job_goes_on(source, tmp_path, monkeypatch):
    whole = job(source, tmp_path / "whole").publish()
    write = CheckpointWriter.write_block

    def killed(writer, index, tensors, losses):
        if index == 1:
            raise KeyboardInterrupt
        write(writer, index, tensors, losses)

    monkeypatch.setattr(CheckpointWriter, "write_block", killed)
    with pytest.raises(KeyboardInterrupt):
        job(source, tmp_path / "int8")
    with pytest.raises(UserError):
        read_model_config(str(tmp_path / "int8.partial"))  # no model yet
    written = []

    def counted(writer, index, tensors, losses):
        written.append(index)
        write(writer, index, tensors, losses)

    monkeypatch.setattr(CheckpointWriter, "write_block", counted)
    assert same(job(source, tmp_path / "int8").publish(), whole)
    assert written == [1]


def test_other_data_are_another_job(source, tmp_path):
    job(source, tmp_path / "int8")
    with pytest.raises(UserError, match="another job"):
        job(source, tmp_path / "int8", seed=1)


def test_memory_that_does_not_hold_a_batch(source, tmp_path, monkeypatch, capsys):
    """A batch that was broken off half way does not count twice."""
    whole = tensors_of(job(source, tmp_path / "whole").publish())
    run, failed = BlockModel.run, []

    def run_two_at_most(model, block, hidden, lengths=None):
        result = run(model, block, hidden[:1], None if lengths is None else lengths[:1])
        if len(hidden) > 1:
            failed.append(len(hidden))
            raise torch.OutOfMemoryError
        return result

    monkeypatch.setattr(BlockModel, "run", run_two_at_most)
    folder = job(source, tmp_path / "int8").publish()
    assert failed == [3]
    assert "memory ran out" in capsys.readouterr().err
    for name, tensor in tensors_of(folder).items():
        # Other batches, other last bits of float32.
        atol = 1 if tensor.dtype == torch.int8 else 1e-5
        torch.testing.assert_close(tensor.float(), whole[name].float(), atol=atol, rtol=1e-4)


def test_what_cannot_be_quantized(source, tmp_path):
    folder = job(source, tmp_path / "int8").publish()
    with pytest.raises(UserError, match="quantized already"):
        job(folder, tmp_path / "twice")


def test_inputs_that_are_no_numbers(source, tmp_path, monkeypatch):
    run = BlockModel.run

    def overflowing(model, block, hidden):
        block.input_layernorm.weight.data[3] = torch.inf
        return run(model, block, hidden)

    monkeypatch.setattr(BlockModel, "run", overflowing)
    with pytest.raises(UserError, match="qkv_proj grow beyond what float32 holds"):
        job(source, tmp_path / "int8")


def test_modules_that_were_not_converted_and_a_folder_without_quantization_config(tmp_path):
    source = tmp_path / "model"
    make_checkpoint(source, "llama")
    samples = load_samples("bundled", Tokenizer.from_folder(source), 2, 32)
    progress = Progress("text", stream=open("/dev/null", "w"))
    target = smooth_quant(
        str(source), str(tmp_path / "w8a8"), samples, CPU, torch.float32, progress
    ).publish()
    edit_config(target, quantization_config=None)  # as LMDeploy 0.2 left it
    found = read_model_config(str(target)).quantization
    assert found is not None and (found.method, found.not_converted) == ("smooth_quant", ())
    load_model(str(target), torch.float32, CPU, ParallelContext())

    name = "model.layers.1.mlp.down_proj"
    plain = load_file(source / "model.safetensors")[f"{name}.weight"]
    shard = target / "model-00003-of-00003.safetensors"
    tensors = load_file(shard)
    assert tensors[f"{name}.weight"].dtype == torch.int8
    del tensors[f"{name}.scale"]
    save_file({**tensors, f"{name}.weight": plain}, shard)
    index = target / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][f"{name}.scale"]
    index.write_text(json.dumps(content))
    edit_config(target, quantization_config={
        "quant_method": "smooth_quant", "modules_to_not_convert": ["layers.1.mlp.down_proj"],
    })
    decoder, _ = load_model(str(target), torch.float32, CPU, ParallelContext())
    assert torch.equal(decoder.layers[1].mlp.down_proj.weight, plain)
    assert hasattr(decoder.layers[0].mlp.down_proj, "w8")
