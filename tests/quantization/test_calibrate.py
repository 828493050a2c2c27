"""Calibration stats: against hooks on transformers' model, and as a file."""

from __future__ import annotations

import io
import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from backend.errors import UserError
from backend.models.registry import read_model_config
from quantize import calibrate as module, stats as stats_module
from quantize.blocks import BlockModel
from quantize.calibrate import (
    CalibrationSettings,
    LinearObserver,
    Observer,
    calibrate,
    embed_samples,
    observe,
)
from quantize.progress import Progress
from quantize.stats import (
    ChannelStats,
    LinearStats,
    fingerprint,
    load_stats,
    run_length,
    sample_stride,
    save_stats,
    stats_bytes,
)
from tests.parity.test_logits import CPU, ids_of
from tests.tiny_model import FAMILIES, make_checkpoint

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo_model"
HOOKED = {
    "input_layernorm": "input_layernorm",
    "self_attn.q_proj": "self_attn.qkv_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "post_attention_layernorm": "post_attention_layernorm",
    "mlp.up_proj": "mlp.gate_up_proj",
    "mlp.down_proj": "mlp.down_proj",
}


def quiet() -> Progress:
    return Progress(stream=io.StringIO())


def expected_stats(x: torch.Tensor) -> ChannelStats:
    """x [T, ...], by the words of ChannelStats."""
    return ChannelStats(
        x.amin(0), x.amax(0), x.abs().amax(0), x.double().mean(0).float(),
        x.double().abs().mean(0).float(),
    )


def assert_same(ours: dict[str, ChannelStats], theirs: dict[str, ChannelStats]) -> None:
    assert set(ours) == set(theirs)
    for name in ours:
        for field in fields(ChannelStats):
            torch.testing.assert_close(
                getattr(ours[name], field.name), getattr(theirs[name], field.name),
                atol=1e-4, rtol=1e-4, msg=lambda text, at=(name, field.name): f"{at}: {text}",
            )


def stats_by_hooks(reference, ids: torch.Tensor) -> dict[str, ChannelStats]:
    """What transformers' modules get, under our names."""
    seen: dict[str, torch.Tensor] = {}

    def watch(module: torch.nn.Module, name: str) -> None:
        module.register_forward_pre_hook(
            lambda _, args: seen.__setitem__(name, args[0].flatten(0, 1))
        )

    for index, layer in enumerate(reference.model.layers):
        for theirs, ours in HOOKED.items():
            watch(layer.get_submodule(theirs), f"layers.{index}.{ours}.input")
    watch(reference.model.norm, "norm.input")
    with torch.inference_mode():
        cache = reference(ids, use_cache=True).past_key_values
    for index, layer in enumerate(cache.layers):
        for name, tensor in (("key", layer.keys), ("value", layer.values)):
            seen[f"layers.{index}.self_attn.{name}"] = tensor.transpose(1, 2).flatten(0, 1)
    return {name: expected_stats(x) for name, x in seen.items()}


# Windows make transformers keep only a layer's last tokens in its cache.
UNWINDOWED = {"mistral": dict(sliding_window=None), "qwen2": dict(use_sliding_window=False)}


@pytest.mark.parametrize("family", FAMILIES)
def test_stats_are_those_of_transformers(tmp_path, family):
    reference = make_checkpoint(tmp_path, family, **UNWINDOWED.get(family, {}))
    ids = torch.stack([ids_of(40, seed) for seed in range(5)])
    ours = observe(BlockModel(tmp_path, CPU), ids, quiet(), batch_size=2)
    assert_same(ours, stats_by_hooks(reference, ids))


def test_spilled_to_disk_is_the_same(tmp_path, monkeypatch):
    make_checkpoint(tmp_path, "llama")
    ids = torch.stack([ids_of(20, seed) for seed in range(5)])
    model = BlockModel(tmp_path, CPU)
    plain = observe(model, ids, quiet(), batch_size=2)
    monkeypatch.setattr(module, "_room_for", lambda total, device: (CPU, total // 2))
    told = io.StringIO()
    assert_same(observe(model, ids, Progress(stream=told), 2, tmp_path), plain)
    assert "go to disk" in told.getvalue()


def test_memory_that_runs_out_in_a_batch_counts_nothing_twice(tmp_path, monkeypatch):
    make_checkpoint(tmp_path, "llama")
    ids = torch.stack([ids_of(20, seed) for seed in range(5)])
    model = BlockModel(tmp_path, CPU)
    plain = observe(model, ids, quiet(), batch_size=2)
    run = BlockModel.run

    def full(self, block, hidden):
        result = run(self, block, hidden)
        if len(hidden) > 2:
            raise torch.OutOfMemoryError("full")
        return result

    monkeypatch.setattr(BlockModel, "run", full)
    told = io.StringIO()
    assert_same(observe(model, ids, Progress(stream=told), batch_size=4), plain)
    assert told.getvalue().count("memory ran out") == 1


def test_observer_of_16_bit_numbers_sums_in_32():
    x = torch.full((4096, 3), 1.01, dtype=torch.bfloat16)
    x[7] = -300.0
    observer = Observer()
    for part in x.split(1000):
        observer.update(part)
    assert observer.tokens == 4096
    for field in fields(ChannelStats):
        ours = getattr(observer.stats(), field.name)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, getattr(expected_stats(x.float()), field.name))


@pytest.mark.parametrize("channels, run", [(256, 128), (192, 64), (96, 32), (40, 1)])
def test_products_of_near_channels_and_a_sample_of_tokens(channels, run):
    x = torch.randn(3000, channels, generator=torch.Generator().manual_seed(0))
    stride = sample_stride(len(x))
    whole = LinearObserver(stride)
    for part in x.split(700):  # as batches are counted
        observer = LinearObserver(stride, whole.tokens)
        for piece in part.split(300):
            observer.update(piece)
        whole.merge(observer)
    stats = whole.stats()
    assert run_length(channels) == run and stats.gram.shape == (channels // run, run, run)
    gram = x.t() @ x / len(x)
    for index, block in enumerate(stats.gram):
        near = slice(index * run, (index + 1) * run)
        torch.testing.assert_close(block, gram[near, near], atol=1e-5, rtol=1e-4)
    assert torch.equal(stats.sample, x[::stride]) and 400 < len(stats.sample) <= 600
    torch.testing.assert_close(stats.absmean, x.abs().mean(0))


@pytest.fixture(scope="module")
def demo_stats():
    settings = CalibrationSettings("c4", samples=4, seqlen=64, seed=3)
    return calibrate(DEMO, settings, CPU, torch.float32, quiet())


def test_the_whole_job_and_its_file(demo_stats, tmp_path, monkeypatch):
    path = tmp_path / "work" / stats_module.STATS_FILE
    save_stats(demo_stats, path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    read = load_stats(path.parent, DEMO)
    assert read.info == demo_stats.info
    assert (read.info.dataset, read.info.samples, read.info.num_blocks) == ("bundled", 4, 5)
    assert read.info.note.startswith("c4 cannot be had here")
    assert_same(read.channels, demo_stats.channels)
    linear, made = read.linear(4, "mlp.down_proj"), demo_stats.linear(4, "mlp.down_proj")
    assert torch.equal(linear.gram, made.gram) and torch.equal(linear.sample, made.sample)
    assert isinstance(linear, LinearStats) and not isinstance(read.keys(0), LinearStats)
    tokens = len(linear.sample) / 512  # few windows have fewer than are kept
    bound = stats_bytes(read_model_config(str(DEMO)), linear.sample.element_size())
    assert bound * tokens < path.stat().st_size < bound * 1.05
    assert read.input(4, "mlp.down_proj").absmax.ndim == 1
    assert read.keys(0).min.shape == read.values(4).max.shape
    assert (read.keys(0).min <= read.keys(0).max).all()
    with pytest.raises(UserError, match="is there already"):
        save_stats(demo_stats, path)
    save_stats(demo_stats, path, overwrite=True)


def test_a_kill_while_writing_leaves_no_file_of_that_name(demo_stats, tmp_path, monkeypatch):
    path = tmp_path / stats_module.STATS_FILE

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_stats(demo_stats, path)
    with pytest.raises(UserError, match="no calibration stats"):
        load_stats(tmp_path)
    monkeypatch.undo()
    save_stats(demo_stats, path)
    assert load_stats(tmp_path).info == demo_stats.info


def test_stats_of_another_model_or_no_stats(demo_stats, tmp_path):
    path = tmp_path / stats_module.STATS_FILE
    other = tmp_path / "other"
    make_checkpoint(other, "llama")
    save_stats(demo_stats, path)
    with pytest.raises(UserError, match="of another model"):
        load_stats(path, other)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="are damaged"):
        load_stats(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(UserError, match="no file of calibration stats"):
        load_stats(path)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_stats(demo_stats, file / "stats.safetensors")


def test_fingerprint_follows_the_weights_and_not_the_place(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_checkpoint(tmp_path / name, "qwen2", seed=seed)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "c")


def test_samples_that_the_model_cannot_take(tmp_path):
    make_checkpoint(tmp_path, "llama")
    model = BlockModel(tmp_path, CPU)
    with pytest.raises(UserError, match="longer than the model's context of 256"):
        embed_samples(model, torch.zeros(1, 257, dtype=torch.int64), print)
    with pytest.raises(UserError, match="token 320, but the model has only 320"):
        embed_samples(model, torch.full((1, 8), 320), print)


def test_values_beyond_the_dtype(tmp_path):
    make_checkpoint(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for name, factor in (("gate", 1e10), ("up", 1e30)):  # each holds it, their product does not
        tensors[f"model.layers.1.mlp.{name}_proj.weight"] *= factor
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"In block 1, mlp\.down_proj meets values .* float32"):
        observe(BlockModel(tmp_path, CPU), ids_of(16)[None], quiet())


def test_info_is_kept_word_by_word(demo_stats, tmp_path):
    stats = replace(demo_stats, info=replace(demo_stats.info, note="标定文本 “x”"))
    save_stats(stats, tmp_path / "s.safetensors")
    assert load_stats(tmp_path / "s.safetensors").info == stats.info
