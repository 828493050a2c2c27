"""Random checkpoints of real shapes: whole, seeded, reused, and loadable by transformers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from backend.errors import UserError
from backend.layers.parallel import ParallelContext
from backend.models import random_weights
from backend.models.checkpoint import read_checkpoint
from backend.models.loader import load_model
from backend.models.model_config import ConfigFields
from backend.models.random_weights import SHAPES, write_random_checkpoint
from backend.models.registry import parse_config
from kernels.packing import unpack_awq
from tests.tiny_model import write_tokenizer

CPU = torch.device("cpu")


def tensors_of(folder):
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def load(folder, dtype=torch.float32):
    return load_model(str(folder), dtype, CPU, ParallelContext())


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_a_config_of_ours_and_of_transformers(shape, tmp_path):
    config = parse_config(ConfigFields({**SHAPES[shape], "torch_dtype": "float16"}))
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[shape]))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.num_hidden_layers == config.num_layers
    assert theirs.num_key_value_heads == config.num_kv_heads
    assert getattr(theirs, "head_dim", None) in (None, config.head_dim)
    assert config.head_dim == (32 if shape == "tiny" else 64 if "0.5b" in shape else 128)


def test_sixteen_bits(tmp_path):
    folder = tmp_path / "model"
    write_random_checkpoint(str(folder), "tiny", dtype="bfloat16")
    _, config = load(folder)
    assert config.dtype == "bfloat16" and config.quantization is None
    tensors = tensors_of(folder)
    assert all(t.dtype == torch.bfloat16 for t in tensors.values())
    weight = tensors["model.layers.1.mlp.up_proj.weight"].float()
    assert 0.018 < weight.std() < 0.022 and abs(weight.mean()) < 0.001
    norm = tensors["model.norm.weight"].float()
    assert 0.9 < norm.min() < norm.max() < 1.1
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, tensors[
        "model.layers.1.mlp.up_proj.weight"
    ])
    assert not list(tmp_path.glob("*.partial"))


def test_four_bits(tmp_path):
    folder = tmp_path / "model"
    write_random_checkpoint(str(folder), "tiny", "awq")
    decoder, config = load(folder)
    assert config.dtype == "float16"
    assert config.quantization is not None and config.quantization.group_size == 128
    weight = decoder.layers[1].mlp.down_proj.weight.float()
    assert 0.015 < weight.std() < 0.025
    # A common part of all weights would grow from layer to layer until float16 cannot hold it.
    assert abs(weight.mean()) < 0.0005
    tensors = tensors_of(folder)
    q = unpack_awq(tensors["model.layers.0.mlp.gate_proj.qweight"])
    counts = torch.bincount(q.flatten().long(), minlength=16) / q.numel()
    assert counts.min() > 0.05 and counts.max() < 0.075
    zeros = unpack_awq(tensors["model.layers.0.mlp.gate_proj.qzeros"])
    assert set(zeros.flatten().tolist()) == {7, 8}
    assert tensors["lm_head.weight"].dtype == torch.float16


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(random_weights, "SHARD_BYTES", 100_000)
    seen = []
    write_random_checkpoint(
        str(tmp_path / "sharded"), "tiny", progress=lambda done, total: seen.append((done, total))
    )
    paths = list((tmp_path / "sharded").glob("*.safetensors"))
    assert len(paths) > 3 and len(read_checkpoint(str(tmp_path / "sharded"))) == len(seen)
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
    monkeypatch.undo()
    write_random_checkpoint(str(tmp_path / "whole"), "tiny")
    a, b = tensors_of(tmp_path / "sharded"), tensors_of(tmp_path / "whole")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_seed_decides(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_checkpoint(str(tmp_path / name), "tiny", "awq", seed=seed)
    a, b, c = (tensors_of(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not any(torch.equal(a[k], c[k]) for k in a)


def test_what_is_there_is_reused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_random_checkpoint(str(folder), "tiny")
    before = (folder / "model.safetensors").stat()
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    write_tokenizer(tokenizer)
    write_random_checkpoint(str(folder), "tiny", tokenizer_folder=str(tokenizer))
    after = (folder / "model.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert (folder / "tokenizer.json").read_text() == (tokenizer / "tokenizer.json").read_text()


def test_what_a_killed_run_left_is_no_checkpoint(tmp_path):
    left = tmp_path / "model.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    write_random_checkpoint(str(tmp_path / "model"), "tiny")
    load(tmp_path / "model")
    assert not left.exists()


def test_another_model_is_never_overwritten(tmp_path):
    write_random_checkpoint(str(tmp_path / "model"), "tiny")
    with pytest.raises(UserError, match="holds something else"):
        write_random_checkpoint(str(tmp_path / "model"), "tiny", "awq")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds something else"):
        write_random_checkpoint(str(tmp_path / "own"), "tiny")
    assert (tmp_path / "own" / "config.json").read_text() == "{}"


def test_bad_arguments_leave_nothing_behind(tmp_path):
    folder = str(tmp_path / "model")
    with pytest.raises(UserError, match="'gpt-5' is not known") as caught:
        write_random_checkpoint(folder, "gpt-5")
    assert "llama-2-7b" in caught.value.hint and "qwen2.5-7b" in caught.value.hint
    with pytest.raises(UserError, match="the method 'gptq'"):
        write_random_checkpoint(folder, "tiny", "gptq")
    with pytest.raises(UserError, match="dtype 'int8' is not one of"):
        write_random_checkpoint(folder, "tiny", dtype="int8")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_random_checkpoint(str(tmp_path / "file" / "model"), "tiny")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
