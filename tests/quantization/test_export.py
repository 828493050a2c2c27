"""The writer of checkpoints: nothing lost on the way, nobody's folder touched, no half result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from backend.errors import UserError
from backend.models.checkpoint import read_checkpoint
from quantize.awq import QuantizedBlock
from quantize.blocks import BlockModel, linears
from quantize.export import JOB, CheckpointWriter, awq_config, awq_tensors, fill_awq
from quantize.rtn import GroupFormat, quantize
from tests.quantization.second_reader import read_weights
from tests.tiny_model import make_checkpoint

FORM = GroupFormat(4, 32)
CPU = torch.device("cpu")


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "model"
    make_checkpoint(folder, "qwen2")
    for name in ("LICENSE", "modeling_own.py", "README.md", "pytorch_model.bin"):
        (folder / name).write_text(name)
    return folder


def rounded(model: BlockModel, index: int):
    """(a block, itself rounded to nearest)."""
    block = model.load_block(index)
    return block, QuantizedBlock(
        {name: quantize(layer.weight, FORM) for name, layer in linears(block).items()},
        {
            name: block.get_submodule(name).weight.data * 2
            for name in ("input_layernorm", "post_attention_layernorm")
        },
        {"self_attn.qkv_proj": block.self_attn.qkv_proj.bias.data + 1},
        {name: 0.25 for name in linears(block)},
    )


def write(source: Path, target: Path, *, job=None, blocks: int = 2, overwrite=False):
    writer = CheckpointWriter(
        str(source), str(target), awq_config(FORM), job or {"seed": 0}, overwrite
    )
    model = BlockModel(str(source), CPU)
    for index in range(writer.blocks_done(), blocks):
        block, quantized = rounded(model, index)
        writer.write_block(index, awq_tensors(block, quantized), quantized.losses)
    return writer


def test_a_block_comes_back_as_it_went(source):
    model = BlockModel(str(source), CPU)
    block, quantized = rounded(model, 1)
    tensors = awq_tensors(block, quantized)
    fill_awq(block, tensors)
    for name, layer in linears(block).items():
        assert torch.equal(layer.weight, quantized.linears[name].dequantize())
    assert torch.equal(block.self_attn.qkv_proj.bias, quantized.biases["self_attn.qkv_proj"])
    assert torch.equal(block.input_layernorm.weight, quantized.norms["input_layernorm"])
    assert tensors["model.layers.1.self_attn.k_proj.qweight"].shape == (64, 4)  # 32 outputs
    assert tensors["model.layers.1.mlp.down_proj.scales"].shape == (4, 64)
    assert tensors["model.layers.1.mlp.down_proj.scales"].dtype == torch.float16


def test_what_is_written(source, tmp_path):
    writer = write(source, tmp_path / "out")
    folder = writer.finish()
    assert folder == tmp_path / "out.partial" and not (tmp_path / "out").exists()
    assert writer.publish() == tmp_path / "out" and not folder.exists()
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"} < names
    assert not names & {"modeling_own.py", "README.md", "pytorch_model.bin"}
    assert not [name for name in names if name.endswith(".tmp")]
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True,
        "version": "gemm", "modules_to_not_convert": None,
    }
    assert config == json.loads((source / "config.json").read_text())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(read_checkpoint(str(out)))
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for path in out.glob("*.safetensors") for tensor in load_file(path).values()
    )
    original, found = load_file(source / "model.safetensors"), read_weights(out)
    assert set(found) == set(original)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(found[name], original[name])
    job = json.loads((out / JOB).read_text())
    assert job["seed"] == 0 and job["losses"]["1"]["mlp.down_proj"] == 0.25


def test_it_goes_on_where_it_was(source, tmp_path):
    first = write(source, tmp_path / "out", blocks=1)
    assert first.blocks_done() == 1
    stray = first.folder / "model-00003-of-00003.tmp"
    stray.write_bytes(b"half of a shard")
    again = CheckpointWriter(
        str(source), str(tmp_path / "out"), awq_config(FORM), {"seed": 0}
    )
    assert again.blocks_done() == 1 and again.finished(1) is None
    assert again.losses == first.losses
    kept = again.finished(0)
    assert kept is not None and "model.layers.0.mlp.up_proj.qweight" in kept[0]
    assert kept[1]["mlp.down_proj"] == 0.25
    write(source, tmp_path / "out").finish()
    assert not stray.exists()


def test_another_jobs_result_is_not_mixed_in(source, tmp_path):
    write(source, tmp_path / "out", blocks=1)
    with pytest.raises(UserError, match="another job with other settings left unfinished"):
        write(source, tmp_path / "out", job={"seed": 1})
    assert write(source, tmp_path / "out", blocks=0, overwrite=True).blocks_done() == 1
    anew = write(source, tmp_path / "out", job={"seed": 1}, blocks=0, overwrite=True)
    assert anew.blocks_done() == 0
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    with pytest.raises(UserError, match="other settings"):
        write(source, tmp_path / "out", job={"seed": 1})


def test_nobodys_folder_is_touched(source, tmp_path):
    theirs = tmp_path / "out.partial"
    theirs.mkdir()
    (theirs / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is no unfinished job"):
            write(source, tmp_path / "out", overwrite=overwrite)
    assert (theirs / "notes.txt").read_text() == "mine"


def test_the_old_result_stays_until_the_new_one_is_whole(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    with pytest.raises(UserError, match="exists already"):
        write(source, out)
    writer = write(source, out, overwrite=True)
    writer.finish()
    assert (out / "old.txt").exists()
    writer.publish()
    assert not (out / "old.txt").exists() and (out / "config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_killed_between_the_two_renames(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    writer = write(source, out, overwrite=True)
    writer.finish()
    out.rename(writer.folder / ".replaced")  # and then the power went
    again = write(source, out)
    again.finish()
    again.publish()
    assert (out / "config.json").exists() and not (out / ".replaced").exists()

    out.rename(tmp_path / "partial")
    (tmp_path / "partial").rename(tmp_path / "out.partial")
    (tmp_path / "out.partial" / ".replaced").mkdir()
    (tmp_path / "out.partial" / ".replaced" / "old.txt").write_text("old")
    write(source, out, job={"seed": 5}, blocks=0, overwrite=True)  # another job begins anew
    assert (out / "old.txt").read_text() == "old"


def test_a_folder_that_came_up_meanwhile_is_not_replaced(source, tmp_path):
    writer = write(source, tmp_path / "out")
    writer.finish()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        writer.publish()
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert writer.publish("out-failed") == tmp_path / "out-failed"


def test_a_damaged_shard_is_named(source, tmp_path):
    writer = write(source, tmp_path / "out", blocks=1)
    shard = writer.folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match="00002-of-00003.safetensors cannot be read"):
        writer.finished(0)


def test_a_full_disk_is_told(source, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    writer = write(source, tmp_path / "out", blocks=1)
    monkeypatch.setattr("quantize.export.save_file", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        writer.write_block(1, {}, {})
    assert writer.blocks_done() == 1
