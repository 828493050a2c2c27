"""AWQ's searches and GPTQ's rounding: never worse than round to nearest, far better on outliers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from quantize.awq import (
    InputMoments,
    SearchSettings,
    output_loss,
    quantize_block,
    quantize_linear,
    realisable,
    rounding_loss,
    search_clip,
    search_scale,
)
from quantize.blocks import BlockModel, linears, observed_inputs
from quantize.rtn import GroupFormat, quantize
from tests.tiny_model import VOCAB_SIZE, make_checkpoint

FORM = GroupFormat(4, 32)


def inputs_of(seed: int, columns: int, outliers: int, by: float, tokens: int = 256):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator)
    x = x @ (torch.randn(columns, columns, generator=generator) * 0.05 + torch.eye(columns))
    x[:, torch.randperm(columns, generator=generator)[:outliers]] *= by
    return x


def moments_of(x: torch.Tensor) -> InputMoments:
    moments = InputMoments(x.shape[1], x.device)
    for part in x.split(100):
        moments.add(part)
    moments.finish()
    return moments


def matrix(seed: int, rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def total(error: torch.Tensor, x: torch.Tensor) -> float:
    """Mean |error x|² by its definition."""
    return float((x.double() @ error.double().t()).square().sum(1).mean())


def awq_loss(weight, x, search: SearchSettings) -> float:
    moments = moments_of(x)
    scale = torch.ones(x.shape[1])
    if search.scale:
        scale = search_scale([weight], moments, search.form)
    moments.divide(scale)
    quantized = quantize_linear(weight * scale, moments, search)
    return total(quantized.dequantize() / scale - weight, x)


def test_the_loss_is_the_products_error():
    x, error = inputs_of(0, 64, 2, 10.0), matrix(1, 24, 64)
    loss = float(output_loss(error, moments_of(x).gram).sum())
    assert loss == pytest.approx(total(error, x), rel=1e-4)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    outliers=st.integers(0, 8),
    by=st.sampled_from((1.0, 5.0, 100.0)),
    symmetric=st.booleans(),
    scale=st.booleans(),
    clip=st.booleans(),
    compensate=st.booleans(),
)
def test_never_worse_than_nearest(seed, outliers, by, symmetric, scale, clip, compensate):
    form = GroupFormat(4, 32, symmetric)
    x, weight = inputs_of(seed, 64, outliers, by), matrix(seed + 1, 16, 64)
    nearest = total(quantize(weight, form).dequantize() - weight, x)
    found = awq_loss(weight, x, SearchSettings(form, scale, clip, compensate))
    assert found <= nearest * 1.001  # float32 of the search, float64 here


def test_planted_outliers():
    """Four of 256 channels 50 times as large: round to nearest spoils what comes of them."""
    x, weight = inputs_of(3, 256, 4, 50.0), matrix(4, 64, 256)
    form = GroupFormat(4, 128)
    nearest = total(quantize(weight, form).dequantize() - weight, x)
    scaled = awq_loss(weight, x, SearchSettings(form, True, False, False))
    awq = awq_loss(weight, x, SearchSettings(form, True, True, False))
    everything = awq_loss(weight, x, SearchSettings(form))
    assert scaled < 0.2 * nearest
    assert awq <= scaled
    assert everything < 0.15 * nearest


def test_compensation_alone():
    """Correlated inputs: what one column lost, the next ones make up for."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(2048, 16, generator=generator) @ torch.randn(16, 128, generator=generator)
    x += torch.randn(2048, 128, generator=generator) * 0.3
    weight, form = matrix(12, 32, 128), GroupFormat(4, 32)
    nearest = total(quantize(weight, form).dequantize() - weight, x)
    assert awq_loss(weight, x, SearchSettings(form, False, False, True)) < 0.3 * nearest
    few = x[:20]  # fewer tokens than channels: the second moment has no inverse
    nearest = total(quantize(weight, form).dequantize() - weight, few)
    assert awq_loss(weight, few, SearchSettings(form, False, False, True)) <= nearest


def test_parts_that_share_inputs_share_scales():
    x = inputs_of(5, 64, 3, 30.0)
    weights = [matrix(6, 16, 64), matrix(7, 8, 64)]
    moments = moments_of(x)
    scale = search_scale(weights, moments, FORM)
    ones = torch.ones(64)
    together = [sum(rounding_loss(w, s, moments.gram, FORM) for w in weights)
                for s in (scale, ones)]
    assert together[0] < together[1]


def test_clip_keeps_ranges_that_matter():
    weight, gram = matrix(8, 32, 64), torch.eye(64)
    weight[0, 5] = 1.0  # everything else in its group is small: worth losing nothing else for
    shrink = search_clip(weight, gram, FORM)
    assert float(shrink.min()) >= 0.5 and float(shrink.max()) <= 1.0
    gram[5, 5] = 1e6  # this input is all that counts
    assert float(search_clip(weight, gram, FORM)[0, 0]) == 1.0


def test_dead_channels_and_dead_inputs():
    x = inputs_of(9, 64, 0, 1.0)
    x[:, 10:40] = 0
    weight = matrix(10, 16, 64)
    weight[:, 3] = 0
    weight[5] = 0
    nearest = total(quantize(weight, FORM).dequantize() - weight, x)
    assert awq_loss(weight, x, SearchSettings(FORM)) <= nearest
    for moments in (moments_of(x), moments_of(torch.zeros_like(x))):
        quantized = quantize_linear(weight, moments, SearchSettings(FORM))
        assert bool(torch.isfinite(quantized.dequantize()).all())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31), dtype=st.sampled_from((torch.bfloat16, torch.float16)),
)
def test_a_norm_can_be_divided_by_realisable_scales_without_error(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    norm = torch.randn(64, generator=generator).to(dtype)
    norm[::7] = 0
    wanted = torch.rand(64, generator=generator) * 50 + 0.01
    scale = realisable(norm, wanted)
    kept = (norm.float() / scale).to(dtype)
    torch.testing.assert_close(kept.float() * scale, norm.float(), rtol=1e-6, atol=0)
    expressible = norm.float().abs() / wanted > 1e-3
    torch.testing.assert_close(scale[expressible], wanted[expressible], rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("llama", dict(num_key_value_heads=4)), ("qwen2", {}), ("qwen3", {}),
     ("llama", dict(num_key_value_heads=4, attention_bias=True, mlp_bias=True))],
    ids=["llama", "qwen2", "qwen3", "biases"],
)
def test_scales_move_without_changing_the_block(tmp_path, family, overrides):
    """With 8 bits, a scale that were lost on its way would show; rounding does not."""
    make_checkpoint(tmp_path, family, **overrides)
    model = BlockModel(str(tmp_path), torch.device("cpu"), torch.float32)
    block = model.load_block(1)
    with torch.no_grad():
        block.input_layernorm.weight[3] *= 40
        block.post_attention_layernorm.weight[7] *= 40
    ids = torch.randint(0, VOCAB_SIZE, (4, 32), generator=torch.Generator().manual_seed(0))
    hidden = model.embed(ids)
    moments = {
        name: InputMoments(layer.in_features, torch.device("cpu"))
        for name, layer in linears(block).items()
    }
    with observed_inputs(block, lambda name, x: moments[name].add(x)):
        expected = model.run(block, hidden)
    for moment in moments.values():
        moment.finish()
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    quantized = quantize_block(block, moments, SearchSettings(GroupFormat(8, 32)), torch.float32)
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} of the block was changed"
    moved = [n for n, w in quantized.norms.items() if not torch.equal(w, norm_of(block, n))]
    assert moved == ["input_layernorm", "post_attention_layernorm"]
    with torch.no_grad():
        for name, layer in linears(block).items():
            layer.weight.copy_(quantized.linears[name].dequantize())
            if name in quantized.biases:
                layer.bias.copy_(quantized.biases[name])
        for name, weight in quantized.norms.items():
            norm_of(block, name).copy_(weight)
    found = model.run(block, hidden)
    error = (found - expected).norm() / (expected - hidden).norm()
    assert float(error) < 0.05  # a lost scale is a factor of up to 40
    assert max(quantized.losses.values()) < 1e-4


def norm_of(block, name: str) -> torch.Tensor:
    return block.get_submodule(name).weight.data
