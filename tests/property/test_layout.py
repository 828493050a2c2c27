"""What a layout presents of a checkpoint and puts together again is the checkpoint, to the bit."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from backend.models.checkpoint import read_header, read_tensor
from backend.models.layout import by_kv_head, stacked
from backend.models.model_config import ConfigFields, ModelConfig
from backend.models.registry import FAMILIES, parse_config

KINDS = {
    "weight": lambda outputs: (outputs, 3),
    "bias": lambda outputs: (outputs,),
    "scale": lambda outputs: (outputs, 1),
    "qweight": lambda outputs: (3, outputs // 8),
    "qzeros": lambda outputs: (2, outputs // 8),
    "scales": lambda outputs: (2, outputs),
}
shapes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.sampled_from([8, 16, 24]))


def config_of(kv_heads: int, queries: int, head_dim: int) -> ModelConfig:
    heads = kv_heads * queries
    raw = dict(
        architectures=["InternLM2ForCausalLM"], hidden_size=heads * head_dim, vocab_size=9,
        num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=8,
        num_hidden_layers=2, max_position_embeddings=64, head_dim=head_dim,
    )  # fmt: skip
    return parse_config(ConfigFields(raw))


@given(shapes, st.sampled_from([stacked, by_kv_head]))
def test_every_output_belongs_to_one_of_q_k_and_v(shape, order):
    config = config_of(*shape)
    parts = order(config)
    sizes = [sum(length for _, length in runs) for runs in parts]
    assert sizes == [config.head_dim * n for n in (config.num_heads, *[config.num_kv_heads] * 2)]
    outputs = [at for runs in parts for start, n in runs for at in range(start, start + n)]
    assert sorted(outputs) == list(range(sum(sizes)))


@settings(max_examples=40, deadline=None)
@given(shapes, st.sampled_from(sorted(FAMILIES)), st.sampled_from(sorted(KINDS)), st.data())
def test_presented_and_restored(shape, architecture, kind, data):
    config, layout = config_of(*shape), FAMILIES[architecture].layout
    outputs = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    modules = [*layout.modules, *([layout.qkv] if layout.qkv else []), "model.rotary_emb"]
    stored = {
        f"{module.replace('*', '1')}.{kind}": torch.randn(KINDS[kind](outputs))
        for module in data.draw(st.sets(st.sampled_from(modules), min_size=1))
    }
    with TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.safetensors")
        save_file(stored, path)
        presented = layout.present(config, read_header(path))
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: read_tensor(file, info) for name, info in presented.items()}
            for name, info in presented.items():
                assert tensors[name].shape == info.shape
                assert layout.stored_name(name) == info.name
                # A rank's share is the same part of the whole.
                ends = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in info.shape]
                source = tuple(slice(first, last) for first, last in ends)
                assert torch.equal(read_tensor(file, info, source), tensors[name][source])
    restored = layout.restore(config, tensors)
    assert restored.keys() == stored.keys()
    assert all(torch.equal(restored[name], tensor) for name, tensor in stored.items())
