"""Block by block is the whole model: against the decoder, and against transformers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from backend.errors import UserError
from backend.layers.norm import RMSNorm
from backend.models.decoder import scale_groups
from quantize.blocks import BlockModel, linears, observed_inputs
from quantize.hidden_store import HiddenStore, in_batches
from tests.parity.test_logits import CPU, ids_of, paged_logits
from tests.tiny_model import FAMILIES, make_checkpoint
from tests.unit.test_awq import GROUP, quantize_checkpoint

CASES = {
    **{family: (family, {}) for family in FAMILIES},
    "biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "mha": ("llama", dict(num_key_value_heads=4, attention_bias=True, mlp_bias=True)),
}


def run_all(model: BlockModel, ids: torch.Tensor) -> torch.Tensor:
    """ids [B, S] -> logits [B, S, vocab_size], block by block."""
    hidden = model.embed(ids)
    for index in range(model.num_blocks):
        hidden = model.run(model.load_block(index), hidden)
    return model.logits(hidden)


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_the_model(tmp_path, name):
    family, overrides = CASES[name]
    reference = make_checkpoint(tmp_path, family, shard_size="100KB", **overrides)
    ids = torch.stack([ids_of(70, seed) for seed in range(3)])
    logits = run_all(BlockModel(tmp_path, CPU), ids)
    assert logits.dtype == torch.float32 and logits.shape == (3, 70, 320)
    with torch.inference_mode():
        torch.testing.assert_close(logits, reference(ids).logits, atol=1e-4, rtol=0)
    whole = paged_logits(tmp_path, ids[1], [70], scattered=True)
    torch.testing.assert_close(logits[1], whole, atol=1e-4, rtol=0)


def test_blocks_of_a_quantized_model(tmp_path):
    make_checkpoint(tmp_path, "llama")
    quantize_checkpoint(tmp_path, GROUP)
    ids = ids_of(40)
    logits = run_all(BlockModel(tmp_path, CPU), ids[None])[0]
    whole = paged_logits(tmp_path, ids, [40], scattered=False)
    torch.testing.assert_close(logits, whole, atol=1e-4, rtol=0)


def test_one_token(tmp_path):
    reference = make_checkpoint(tmp_path, "llama")
    ids = torch.tensor([[5], [6], [7], [8], [9]])
    with torch.inference_mode():
        expected = reference(ids).logits
    torch.testing.assert_close(run_all(BlockModel(tmp_path, CPU), ids), expected, atol=1e-4, rtol=0)


def test_run_leaves_its_input_and_tells_kv(tmp_path):
    reference = make_checkpoint(tmp_path, "qwen3")
    model = BlockModel(tmp_path, CPU)
    ids = torch.stack([ids_of(30, seed) for seed in range(2)])
    hidden = model.embed(ids)
    before = hidden.clone()
    model.run(model.load_block(0), hidden)
    assert torch.equal(hidden, before)
    with torch.inference_mode():
        cache = reference(ids, use_cache=True).past_key_values
    for ours, theirs in zip(model.kv(), (cache.layers[0].keys, cache.layers[0].values)):
        torch.testing.assert_close(ours, theirs.transpose(1, 2), atol=1e-4, rtol=0)


def test_weights_are_plain_and_checked(tmp_path):
    make_checkpoint(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    block = BlockModel(tmp_path, CPU).load_block(1)
    layers = linears(block)
    assert list(layers) == [
        "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj",
    ]
    down = layers["mlp.down_proj"].weight
    assert down.is_contiguous()
    assert torch.equal(down, tensors["model.layers.1.mlp.down_proj.weight"])
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 4] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    model = BlockModel(tmp_path, CPU)
    model.load_block(0)
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.k_proj\.weight contains NaN"):
        model.load_block(1)


@pytest.mark.parametrize("name", CASES)
def test_scaling_a_group_changes_nothing(tmp_path, name):
    family, overrides = CASES[name]
    make_checkpoint(tmp_path, family, **overrides)
    model = BlockModel(tmp_path, CPU)
    block = model.load_block(0)
    hidden = model.embed(ids_of(40)[None])
    expected = model.run(block, hidden)
    groups = scale_groups(block)
    own_kv = model.config.num_heads == model.config.num_kv_heads
    assert [group.name for group in groups] == [
        key for key in linears(block) if own_kv or key != "self_attn.o_proj"
    ]
    for seed, group in enumerate(groups):
        generator = torch.Generator().manual_seed(seed)
        scale = torch.rand(group.targets[0].in_features, generator=generator) + 0.5
        with torch.no_grad():
            if isinstance(group.source, RMSNorm):
                group.source.weight[group.rows] /= scale
            else:
                group.source.weight[group.rows] /= scale[:, None]
                if group.source.bias is not None:
                    group.source.bias[group.rows] /= scale
            for target in group.targets:
                target.weight *= scale
        torch.testing.assert_close(model.run(block, hidden), expected, atol=1e-4, rtol=1e-4)


def test_observed_inputs_are_those_of_transformers(tmp_path):
    reference = make_checkpoint(tmp_path, "qwen2")
    model = BlockModel(tmp_path, CPU)
    block = model.load_block(0)
    ids = torch.stack([ids_of(20, seed) for seed in range(2)])
    ours, theirs = {}, {}
    methods = {name: layer.method for name, layer in linears(block).items()}
    with observed_inputs(block, ours.__setitem__):
        model.run(block, model.embed(ids))
    assert {name: layer.method for name, layer in linears(block).items()} == methods
    for name, parts in (("q_proj", "self_attn.qkv_proj"), ("o_proj", "self_attn.o_proj"),
                        ("up_proj", "mlp.gate_up_proj"), ("down_proj", "mlp.down_proj")):
        module = getattr(
            getattr(reference.model.layers[0], parts.split(".")[0]), name
        )
        module.register_forward_pre_hook(
            lambda _, args, key=parts: theirs.__setitem__(key, args[0].flatten(0, 1))
        )
    with torch.inference_mode():
        reference(ids)
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("in_memory", [0, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_store(tmp_path, in_memory, dtype):
    values = torch.arange(7 * 4 * 8, dtype=dtype).view(7, 4, 8)
    store = HiddenStore((7, 4, 8), dtype, CPU, in_memory * values[0].nbytes, tmp_path)
    assert len(store) == 7 and store.in_memory == in_memory
    assert not list(tmp_path.iterdir())  # the file has no name
    for start in range(0, 7, 2):
        store[start : start + 2] = values[start : start + 2]
    for start in range(0, 7, 3):
        assert torch.equal(store[start : start + 3], values[start : start + 3])
    read = store[0:7]
    read.zero_()
    assert torch.equal(store[0:7], values)


@pytest.mark.parametrize(("samples", "folder"), [(1 << 20, "."), (1, "missing")])
def test_hidden_store_without_room(tmp_path, samples, folder):
    shape = (samples, 1 << 20, 1 << 12)
    with pytest.raises(UserError, match="hidden states find no place in"):
        HiddenStore(shape, torch.float32, CPU, 0, tmp_path / folder)
    assert not list(tmp_path.iterdir())


def test_batches_shrink_when_memory_runs_out():
    done, notes = [], []

    def work(batch: slice) -> None:
        if batch.stop - batch.start > 2:
            raise torch.OutOfMemoryError("full")
        done.extend(range(batch.start, batch.stop))

    assert in_batches(7, 5, work, notes.append) == 2
    assert done == list(range(7))
    assert len(notes) == 1 and "2 sample(s)" in notes[0]


def test_one_sample_that_does_not_fit():
    def work(batch: slice) -> None:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(UserError, match="one sample"):
        in_batches(4, 2, work, lambda text: None)
