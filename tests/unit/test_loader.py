"""Loading checkpoints: whole, sharded, tied; and one clear sentence for each that is damaged."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from backend.errors import UserError
from backend.layers.parallel import ParallelContext
from backend.models.loader import build_model, is_finite, load_model
from backend.models.registry import read_model_config
from tests.tiny_model import make_checkpoint

CPU = torch.device("cpu")
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint in one file and the same one in shards."""
    folder = tmp_path_factory.mktemp("made")
    make_checkpoint(folder / "whole", "llama")
    make_checkpoint(folder / "sharded", "llama", shard_size="100KB")
    return folder


@pytest.fixture
def whole(made, tmp_path):
    return shutil.copytree(made / "whole", tmp_path / "model")


@pytest.fixture
def sharded(made, tmp_path):
    return shutil.copytree(made / "sharded", tmp_path / "model")


def load(folder, dtype=torch.float32):
    return load_model(str(folder), dtype, CPU, ParallelContext())


def parameters(folder):
    return [p.to_dense() for p in load(folder)[0].parameters()]


def refused(folder, dtype=torch.float32):
    with pytest.raises(UserError) as caught:
        load(folder, dtype)
    return str(caught.value)


def edit(path, change):
    """Rewrite a safetensors file after `change(tensors)`."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_shards_hold_the_same_model(made):
    assert len(list((made / "sharded").glob("*.safetensors"))) > 2
    for a, b in zip(parameters(made / "whole"), parameters(made / "sharded"), strict=True):
        assert torch.equal(a, b)


def test_shards_may_be_links(sharded, tmp_path):
    """As in the cache of huggingface_hub."""
    for shard in sharded.glob("*.safetensors"):
        target = tmp_path / f"blob-{shard.name}"
        shard.rename(target)
        shard.symlink_to(target)
    load(sharded)


def test_no_state_is_shared_with_the_file(whole):
    decoder, _ = load(whole)
    before = [p.clone() for p in decoder.parameters()]
    edit(whole / WHOLE, lambda tensors: [t.zero_() for t in tensors.values()])
    assert all(torch.equal(a, b) for a, b in zip(before, decoder.parameters(), strict=True))


def test_buffers_of_old_versions_and_a_tied_head_are_ignored(tmp_path):
    make_checkpoint(tmp_path, "qwen3")

    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit(tmp_path / WHOLE, change)
    load(tmp_path)


def test_python_files_and_auto_map_are_never_run(whole):
    config = json.loads((whole / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Evil"}
    (whole / "config.json").write_text(json.dumps(config))
    (whole / "modeling.py").write_text(f"open({str(whole / 'ran')!r}, 'w')")
    load(whole)
    assert not (whole / "ran").exists()


def test_weight_bytes(made):
    decoder, _ = load(made / "whole", torch.bfloat16)
    embedding, head = 320 * 64, 320 * 64
    layer = 64 * 64 * 2 + 2 * 32 * 64 + 3 * 64 * 128 + 2 * 64
    assert decoder.weight_bytes() == 2 * (embedding + head + 2 * layer + 64)


def test_random_weights_are_seeded(made):
    config = read_model_config(str(made / "whole"))

    def weights(seed):
        decoder = build_model(config, torch.float32, CPU, ParallelContext(), seed)
        return torch.cat([p.flatten() for p in decoder.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert torch.isfinite(weights(1)).all()


class Screen(io.StringIO):
    """Standard error on a terminal."""

    def isatty(self):
        return True


def test_progress_is_drawn_on_a_terminal_only(made, monkeypatch):
    screen, file = Screen(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    load(made / "sharded")
    assert "Loading weights: 100%" in screen.getvalue()
    monkeypatch.setattr(sys, "stderr", file)
    load(made / "sharded")
    assert file.getvalue() == ""


def test_only_the_first_rank_draws(made, monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    load_model(str(made / "whole"), torch.float32, CPU, ParallelContext(1, 2))
    assert screen.getvalue() == ""


def test_finiteness():
    x = torch.zeros(7, 5)
    assert is_finite(x) and is_finite(x[:0])
    for bad in (float("nan"), float("inf"), -float("inf")):
        x[3, 2] = bad
        assert not is_finite(x) and not is_finite(x.bfloat16()) and not is_finite(x.half())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "model.gguf"])
def test_other_formats_are_refused_with_the_reason(whole, name):
    (whole / WHOLE).rename(whole / name)
    message = refused(whole)
    assert name in message and "safetensors" in message
    assert ("run code" in message) == (not name.endswith("gguf"))


def test_no_weights_at_all(whole):
    (whole / WHOLE).unlink()
    assert "has no weights" in refused(whole)


def test_shards_without_an_index(sharded):
    (sharded / INDEX).unlink()
    assert "model.safetensors.index.json" in refused(sharded)


def test_a_missing_shard(sharded):
    path = min(sharded.glob("*.safetensors"))
    path.unlink()
    assert f"{path} is missing" in refused(sharded)


def test_swapped_shards(sharded):
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    first.rename(sharded / "x")
    second.rename(first)
    (sharded / "x").rename(second)
    assert "Was a shard renamed?" in refused(sharded)


@pytest.mark.parametrize(
    "name",
    [
        "../model-00001.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "x.bin",
        "",
        3,
        None,
        "a\n.safetensors",
        "a.safetensors\n",
    ],
)
def test_an_index_that_points_elsewhere(sharded, name):
    edit_index(sharded, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    assert "not the name of a .safetensors file in this folder" in refused(sharded)


def test_an_index_with_a_tensor_that_is_nowhere(sharded):
    name = min(sharded.glob("*.safetensors")).name
    edit_index(sharded, lambda index: index["weight_map"].update({"no.such.weight": name}))
    assert "does not hold the tensor no.such.weight" in refused(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_an_index_without_a_map(sharded, weight_map):
    edit_index(sharded, lambda index: index.update(weight_map=weight_map))
    assert "has no weight_map" in refused(sharded)


def test_a_pipe_for_a_shard_does_not_block(sharded):
    path = min(sharded.glob("*.safetensors"))
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in refused(sharded)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_file(whole, keep):
    path = whole / WHOLE
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    message = refused(whole)
    assert f"{WHOLE} is truncated" in message and "Download" in message


@pytest.mark.parametrize(
    "content, words",
    [
        ((200 << 20).to_bytes(8, "little") + b"{}", "header would have"),
        (b"<!DOCTYPE html><html>not found", "header would have"),
        ((2).to_bytes(8, "little") + b"{x", "damaged header"),
        ((2).to_bytes(8, "little") + b"[]", "damaged header"),
        ((8).to_bytes(8, "little") + b'{"a": 1}', "bad entry for a"),
    ],
)
def test_a_damaged_header(whole, content, words):
    (whole / WHOLE).write_bytes(content)
    assert words in refused(whole)


def test_a_missing_tensor(whole):
    edit(whole / WHOLE, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "lacks the tensor model.layers.1.mlp.up_proj.weight" in refused(whole)


def test_an_unexpected_tensor(whole):
    name = "model.layers.0.self_attn.q_proj.bias"
    edit(whole / WHOLE, lambda tensors: tensors.update({name: torch.zeros(64)}))
    assert f"holds the tensor {name}" in refused(whole)


def test_a_config_of_another_shape(whole):
    config = json.loads((whole / "config.json").read_text())
    config["intermediate_size"] = 256
    (whole / "config.json").write_text(json.dumps(config))
    message = refused(whole)
    assert "has the shape [" in message and "256" in message and "config.json asks for" in message


@pytest.mark.parametrize("layers, words", [(1, "holds the tensor model.layers.1"), (3, "lacks")])
def test_a_config_of_another_depth(whole, layers, words):
    config = json.loads((whole / "config.json").read_text())
    config["num_hidden_layers"] = layers
    (whole / "config.json").write_text(json.dumps(config))
    assert words in refused(whole)


def test_weights_that_are_integers(whole):
    edit(whole / WHOLE, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)}))
    assert "lm_head.weight is stored as I8" in refused(whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_numbers(whole, bad, dtype):
    def change(tensors):
        tensors["model.layers.1.self_attn.v_proj.weight"][5, 7] = bad

    edit(whole / WHOLE, change)
    assert "v_proj.weight contains NaN or infinity" in refused(whole, dtype)


def test_weights_beyond_the_range_of_float16(whole):
    def change(tensors):
        tensors["model.norm.weight"][0] = 1e6

    edit(whole / WHOLE, change)
    load(whole)
    assert "model.norm.weight has values that float16 cannot hold" in refused(whole, torch.float16)
