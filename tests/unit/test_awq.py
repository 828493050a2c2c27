"""4-bit AWQ checkpoints: loaded whole, fused, sliced by rank; and refused when they do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from backend.errors import UserError
from backend.layers.methods import awq
from backend.layers.methods.awq import AWQMethod
from backend.layers.parallel import ParallelContext
from backend.models import loader
from backend.models.loader import build_model, check_dtype, load_model
from backend.models.registry import read_model_config
from kernels import ops
from kernels.packing import dequantize_w4, pack_awq
from tests.tiny_model import make_checkpoint

CPU = torch.device("cpu")
WHOLE = "model.safetensors"
GROUP = 32


def quantize_checkpoint(folder: Path, group_size: int = GROUP, keep: tuple[str, ...] = ()) -> dict:
    """Rewrite a tiny 16-bit checkpoint as AutoAWQ would, rounding to nearest.

    Returns the state dict that the quantized checkpoint stands for, in float32.
    """
    tensors = load_file(folder / WHOLE)
    stored: dict[str, Tensor] = {}
    for name, weight in list(tensors.items()):
        linear = "_proj.weight" in name
        if not linear or any(module in name for module in keep):
            stored[name] = weight
            continue
        groups = weight.float().unflatten(1, (-1, group_size))
        low, high = groups.aminmax(dim=-1)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float()).round().clamp(0, 15)
        q = (groups / scales.float()[..., None]).round() + zeros[..., None]
        q = q.clamp(0, 15)
        tensors[name] = ((q - zeros[..., None]) * scales.float()[..., None]).flatten(1)
        prefix = name.removesuffix(".weight")
        stored[f"{prefix}.qweight"] = pack_awq(q.flatten(1).t().to(torch.uint8).contiguous())
        stored[f"{prefix}.qzeros"] = pack_awq(zeros.t().to(torch.uint8).contiguous())
        stored[f"{prefix}.scales"] = scales.t().contiguous()
    save_file(stored, folder / WHOLE, metadata={"format": "pt"})
    edit_config(
        folder,
        quantization_config={
            "quant_method": "awq",
            "bits": 4,
            "group_size": group_size,
            "version": "gemm",
            "zero_point": True,
            "modules_to_not_convert": list(keep) or None,
        },
    )
    return tensors


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit(folder: Path, **changes: Tensor | None) -> None:
    tensors = {**load_file(folder / WHOLE), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / WHOLE)


def load(folder: Path, parallel: ParallelContext | None = None, dtype=torch.float32):
    return load_model(str(folder), dtype, CPU, parallel or ParallelContext())[0]


def refused(folder: Path, parallel: ParallelContext | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, parallel)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path) -> Path:
    make_checkpoint(tmp_path, "llama")
    return tmp_path


@pytest.fixture
def packed(monkeypatch) -> None:
    """Keep 4 bits on the CPU, as a GPU does; the reference multiplies by them."""
    monkeypatch.setattr(loader, "linear_method", lambda config, dtype, device: AWQMethod(GROUP))


def fused(tensors: dict, layer: int, *names: str) -> Tensor:
    return torch.cat([tensors[f"model.layers.{layer}.{name}.weight"] for name in names])


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


@pytest.mark.parametrize("group_size", [32, 64])
def test_a_cpu_multiplies_by_the_unpacked_weights(folder, group_size):
    tensors = quantize_checkpoint(folder, group_size)
    decoder = load(folder)
    for index, layer in enumerate(decoder.layers):
        assert torch.equal(layer.self_attn.qkv_proj.weight, fused(tensors, index, *QKV))
        assert torch.equal(layer.mlp.gate_up_proj.weight, fused(tensors, index, *GATE_UP))
        down = tensors[f"model.layers.{index}.mlp.down_proj.weight"]
        assert torch.equal(layer.mlp.down_proj.weight, down)
    assert torch.equal(decoder.lm_head.weight, tensors["lm_head.weight"])
    assert not [name for name, _ in decoder.named_parameters() if "scales" in name]


def test_fused_layers_are_one_packed_matrix(folder, packed):
    tensors = quantize_checkpoint(folder)
    decoder = load(folder)
    for index, layer in enumerate(decoder.layers):
        qkv, gate_up = layer.self_attn.qkv_proj, layer.mlp.gate_up_proj
        assert torch.equal(dequantize_w4(qkv.w4), fused(tensors, index, *QKV))
        assert torch.equal(dequantize_w4(gate_up.w4), fused(tensors, index, *GATE_UP))


def test_sizes_that_are_no_whole_tiles_and_more_outputs_than_are_unpacked_at_a_time(
    tmp_path, packed, monkeypatch
):
    monkeypatch.setattr(awq, "RUN_OUTPUTS", 64)
    make_checkpoint(tmp_path, "llama", intermediate_size=160, num_key_value_heads=1)
    tensors = quantize_checkpoint(tmp_path)
    layer = load(tmp_path).layers[0]
    qkv, gate_up = fused(tensors, 0, *QKV), fused(tensors, 0, *GATE_UP)
    assert qkv.shape[0] == 96 and gate_up.shape[0] == 320
    assert torch.equal(dequantize_w4(layer.self_attn.qkv_proj.w4), qkv)
    assert torch.equal(dequantize_w4(layer.mlp.gate_up_proj.w4), gate_up)
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(dequantize_w4(layer.mlp.down_proj.w4), down)
    monkeypatch.setattr(loader, "linear_method", lambda *_: AWQMethod(GROUP, (), torch.float32))
    assert torch.equal(load(tmp_path).layers[0].mlp.gate_up_proj.weight, gate_up)


def test_products_with_packed_weights(folder, packed):
    tensors = quantize_checkpoint(folder)
    decoder = load(folder)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    layer = decoder.layers[1]
    torch.testing.assert_close(layer.self_attn.qkv_proj(x), x @ fused(tensors, 1, *QKV).t())
    gate, up = (x @ fused(tensors, 1, *GATE_UP).t()).chunk(2, dim=-1)
    gated = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(layer.mlp.gate_up_proj.gated(x), gated)
    down = tensors["model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(layer.mlp.down_proj(gated), gated @ down.t())


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_batch_invariance_reaches_the_kernels(folder, packed, monkeypatch, batch_invariant):
    quantize_checkpoint(folder)
    decoder, _ = load_model(
        str(folder), torch.float32, CPU, ParallelContext(), batch_invariant=batch_invariant
    )
    seen = []

    def linear_w4(x, weight, bias, batch_invariant=False):
        seen.append(batch_invariant)
        return x.new_zeros(len(x), weight.out_features)

    def gated_linear_w4(x, weight, batch_invariant=False):
        return linear_w4(x, weight, None, batch_invariant)

    monkeypatch.setattr(ops, "linear_w4", linear_w4)
    monkeypatch.setattr(ops, "gated_linear_w4", gated_linear_w4)
    layer, x = decoder.layers[0], torch.zeros(1, 64)
    layer.self_attn.qkv_proj(x), layer.mlp.gate_up_proj.gated(x)
    assert seen == [batch_invariant] * 2
    assert decoder.lm_head.batch_invariant == batch_invariant


def test_gated_products_of_other_formats(folder):
    tensors = quantize_checkpoint(folder)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    gate, up = (x @ fused(tensors, 0, *GATE_UP).t()).chunk(2, dim=-1)
    gated = load(folder).layers[0].mlp.gate_up_proj.gated(x)
    torch.testing.assert_close(gated, torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("family, biases", [("qwen2", {}), ("llama", {"mlp_bias": True})])
def test_biases_stay_as_they_are(tmp_path, family, biases, packed):
    make_checkpoint(tmp_path, family, **biases)
    tensors = quantize_checkpoint(tmp_path)
    decoder = load(tmp_path)
    names, layer = (
        (GATE_UP, decoder.layers[0].mlp.gate_up_proj)
        if biases
        else (QKV, decoder.layers[0].self_attn.qkv_proj)
    )
    bias = torch.cat([tensors[f"model.layers.0.{name}.bias"] for name in names])
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    expected = x @ fused(tensors, 0, *names).t() + bias
    torch.testing.assert_close(layer(x), expected)
    if biases:
        gate, up = expected.chunk(2, dim=-1)
        torch.testing.assert_close(layer.gated(x), torch.nn.functional.silu(gate) * up)


def test_weight_bytes_are_those_of_the_packed_weights(folder, packed):
    quantize_checkpoint(folder)
    decoder = load(folder, dtype=torch.float16)
    counted = sum(
        layer.w4.qweight.nbytes + layer.w4.scale_zero.nbytes
        for layer in decoder.modules()
        if hasattr(layer, "w4")
    )
    others = 2 * (2 * 320 * 64 + 5 * 64)  # embedding, head, norms
    assert decoder.weight_bytes() == counted + others


@pytest.mark.parametrize("rank", [0, 1])
def test_slices_of_two_ranks(folder, packed, rank):
    tensors = quantize_checkpoint(folder)
    layer = load(folder, ParallelContext(rank, 2)).layers[1]
    halves = [tensors[f"model.layers.1.{name}.weight"].chunk(2)[rank] for name in QKV]
    assert torch.equal(dequantize_w4(layer.self_attn.qkv_proj.w4), torch.cat(halves))
    halves = [tensors[f"model.layers.1.{name}.weight"].chunk(2)[rank] for name in GATE_UP]
    assert torch.equal(dequantize_w4(layer.mlp.gate_up_proj.w4), torch.cat(halves))
    for name, part in (("self_attn.o_proj", layer.self_attn.o_proj),
                       ("mlp.down_proj", layer.mlp.down_proj)):
        half = tensors[f"model.layers.1.{name}.weight"].chunk(2, dim=1)[rank]
        assert torch.equal(dequantize_w4(part.w4), half)


def test_a_rank_that_would_cut_a_group(folder):
    quantize_checkpoint(folder, 64)
    message = refused(folder, ParallelContext(0, 2))
    assert "At tp 2 a rank's part of model.layers.0.self_attn.o_proj" in message
    assert "32 inputs" in message and "units of 64" in message and "smaller tp" in message


def test_a_rank_that_would_cut_a_word(tmp_path):
    make_checkpoint(tmp_path, "llama", head_dim=4, num_attention_heads=16, num_key_value_heads=2)
    quantize_checkpoint(tmp_path)
    message = refused(tmp_path, ParallelContext(0, 2))
    assert "k_proj" in message and "4 outputs" in message and "units of 8" in message


def test_sizes_that_are_no_whole_groups(folder):
    edit_config(
        folder,
        intermediate_size=96,
        quantization_config={"quant_method": "awq", "bits": 4, "group_size": 64},
    )
    assert "model.layers.0.mlp.down_proj has 96 inputs" in refused(folder)


@pytest.mark.parametrize("entry", ["down_proj", "mlp.down_proj", "model.layers.0.mlp.down_proj"])
def test_modules_that_were_not_converted(folder, entry):
    tensors = quantize_checkpoint(folder, keep=(entry,))
    decoder = load(folder)
    for index in (0, 1):
        down = tensors[f"model.layers.{index}.mlp.down_proj.weight"]
        assert torch.equal(decoder.layers[index].mlp.down_proj.weight, down)


def test_half_of_a_fused_layer_not_converted(folder):
    quantize_checkpoint(folder, keep=("gate_proj",))
    assert "names model.layers.0.mlp.gate_proj but not model.layers.0.mlp.up_proj" in refused(
        folder
    )


@pytest.mark.parametrize("name", ["qweight", "qzeros", "scales"])
def test_a_tensor_that_is_missing(folder, name):
    quantize_checkpoint(folder)
    full = f"model.layers.1.mlp.up_proj.{name}"
    edit(folder, **{full: None})
    assert f"lacks the tensor {full}" in refused(folder)


def test_packed_words_that_are_no_integers(folder):
    quantize_checkpoint(folder)
    full = "model.layers.1.mlp.up_proj.qweight"
    edit(folder, **{full: load_file(folder / WHOLE)[full].float()})
    assert f"{full} is stored as F32, not as I32" in refused(folder)


def test_scales_that_are_no_numbers(folder):
    quantize_checkpoint(folder)
    full = "model.layers.0.self_attn.v_proj.scales"
    scales = load_file(folder / WHOLE)[full]
    scales[1, 3] = torch.nan
    edit(folder, **{full: scales})
    assert f"{full} contains NaN or infinity" in refused(folder)


def test_config_and_weights_of_different_kinds(folder, tmp_path_factory):
    plain = tmp_path_factory.mktemp("plain")
    make_checkpoint(plain, "llama")
    edit_config(plain, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 32})
    assert "lacks the tensor" in refused(plain) and "qweight" in refused(plain)


@pytest.mark.parametrize("group_size", [32, 64])
def test_a_folder_without_quantization_config_is_known_by_its_tensors(folder, group_size):
    """As LMDeploy 0.2 wrote them: float32 scales, too."""
    tensors = quantize_checkpoint(folder, group_size)
    edit_config(folder, quantization_config=None)
    scales = {n: t.float() for n, t in load_file(folder / WHOLE).items() if n.endswith(".scales")}
    edit(folder, **scales)
    found = read_model_config(str(folder)).quantization
    assert found is not None and (found.method, found.group_size) == ("awq", group_size)
    down = tensors["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(load(folder).layers[1].mlp.down_proj.weight, down)


def test_packed_tensors_of_another_format_are_not_taken_for_it(folder):
    quantize_checkpoint(folder)
    edit_config(folder, quantization_config=None)
    stored = load_file(folder / WHOLE)  # GPTQ packs inputs: its qweight is [in / 8, out]
    edit(folder, **{
        name: torch.zeros(8 * words.shape[0] // 64, 8 * words.shape[1], dtype=torch.int32)
        for name, words in stored.items() if name.endswith(".qweight")
    })
    assert read_model_config(str(folder)).quantization is None
    assert "lacks the tensor" in refused(folder)


def test_another_group_size_than_stored(folder):
    quantize_checkpoint(folder, 32)
    edit_config(folder, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 64})
    words = "down_proj.qzeros has the shape [4, 8], but config.json asks for [2, 8]"
    assert words in refused(folder)


def test_float32_is_for_a_cpu(folder):
    quantize_checkpoint(folder)
    config = read_model_config(str(folder))
    check_dtype(config, torch.float32, CPU)
    check_dtype(config, torch.float16, torch.device("cuda"))
    with pytest.raises(UserError, match="cannot run in float32 on a GPU") as caught:
        check_dtype(config, torch.float32, torch.device("cuda"))
    assert caught.value.field == "dtype"


def test_random_weights(folder):
    quantize_checkpoint(folder)
    config = read_model_config(str(folder))
    weights = [
        build_model(config, torch.float32, CPU, ParallelContext(), seed).layers[0].mlp.down_proj
        for seed in (1, 1, 2)
    ]
    assert torch.equal(weights[0].weight, weights[1].weight)
    assert not torch.equal(weights[0].weight, weights[2].weight)
    assert 0.01 < weights[0].weight.std() < 0.04
