"""Families with layouts of their own are quantized as the Llama or Qwen2 that they equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from backend.models.registry import read_model_config
from backend.tokenizer import Tokenizer
from quantize.auto_awq import auto_awq
from quantize.awq import SearchSettings
from quantize.data import load_samples
from quantize.export import CheckpointWriter
from quantize.progress import Progress
from quantize.rtn import GroupFormat
from quantize.smoothquant import smooth_quant
from tests.family_layouts import make_family
from tests.parity.test_logits import ids_of, paged_logits
from tests.tiny_model import write_tokenizer

CPU = torch.device("cpu")


def quantized(method: str, source: Path) -> Path:
    samples = load_samples("bundled", Tokenizer.from_folder(source), 4, 32)
    target = str(source) + "-" + method
    common = (CPU, torch.float32, Progress("text", stream=open("/dev/null", "w")))
    if method == "smooth_quant":
        return smooth_quant(str(source), target, samples, *common).publish()
    search = SearchSettings(GroupFormat(4, 32))
    return auto_awq(str(source), target, samples, search, *common).publish()


def names_of(folder: Path) -> set[str]:
    return {name for path in folder.glob("*.safetensors") for name in load_file(path)}


@pytest.mark.parametrize("method", ["auto_awq", "smooth_quant"])
@pytest.mark.parametrize(
    "family, stored",
    [
        ("internlm2_biases", "model.layers.1.attention.wqkv"),
        ("baichuan2", "model.layers.1.self_attn.W_pack"),
        ("qwen", "transformer.h.1.mlp.w2"),
    ],
)
def test_the_result_is_the_equal_models(tmp_path, family, stored, method):
    model = make_family(tmp_path / "family", family)
    model.save_pretrained(tmp_path / "equal")
    write_tokenizer(tmp_path / "equal")
    results = [quantized(method, tmp_path / name) for name in ("family", "equal")]
    # Written in the family's own layout, as the config.json beside it says.
    kind = "qweight" if method == "auto_awq" else "weight"
    assert f"{stored}.{kind}" in names_of(results[0])
    assert not any("q_proj" in name for name in names_of(results[0]))
    assert read_model_config(str(results[0])).quantization is not None
    ids = ids_of(40)
    logits = [paged_logits(folder, ids, [30, *range(31, 41)], True) for folder in results]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


def test_a_finished_block_is_read_as_it_was_written(tmp_path):
    make_family(tmp_path / "source", "internlm2_biases")
    prefix = "model.layers.0.self_attn"
    tensors = {}
    for part, rows in (("q", 64), ("k", 32), ("v", 32)):
        tensors[f"{prefix}.{part}_proj.qweight"] = torch.randint(0, 99, (64, rows // 8)).int()
        tensors[f"{prefix}.{part}_proj.scales"] = torch.rand(2, rows).half()
        tensors[f"{prefix}.{part}_proj.bias"] = torch.rand(rows)
    tensors["model.layers.0.mlp.up_proj.qweight"] = torch.randint(0, 99, (64, 16)).int()
    writer = CheckpointWriter(str(tmp_path / "source"), str(tmp_path / "target"), {}, {})
    writer.write_block(0, tensors, {"self_attn.qkv_proj": 0.5})
    stored = load_file(writer.folder / "model-00002-of-00003.safetensors")
    assert stored["model.layers.0.attention.wqkv.qweight"].shape == (64, 16)
    read = writer.finished(0)
    assert read is not None and read[1] == {"self_attn.qkv_proj": 0.5}
    assert read[0].keys() == tensors.keys()
    assert all(torch.equal(read[0][name], tensor) for name, tensor in tensors.items())
