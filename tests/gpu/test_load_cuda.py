"""Loading straight to a GPU: the same weights as on a CPU, and no more memory than they need."""

from __future__ import annotations

import pytest
import torch

from backend.errors import UserError
from backend.layers.parallel import ParallelContext
from backend.models.loader import load_model
from backend.models.random_weights import write_random_checkpoint
from kernels.packing import dequantize_w4
from tests.tiny_model import make_checkpoint
from tests.unit.test_awq import (
    GATE_UP,
    QKV,
    WHOLE,
    edit,
    fused,
    load_file,
    quantize_checkpoint,
)

CUDA = torch.device("cuda")


def load(folder, dtype=torch.float16):
    return load_model(str(folder), dtype, CUDA, ParallelContext())[0]


def test_sixteen_bit_weights_in_shards(tmp_path):
    model = make_checkpoint(tmp_path, "qwen2", shard_size="100KB")
    decoder = load(tmp_path, torch.float32)
    for theirs, ours in zip(model.model.layers, decoder.layers, strict=True):
        qkv = theirs.self_attn
        rows = torch.cat([qkv.q_proj.weight, qkv.k_proj.weight, qkv.v_proj.weight])
        assert torch.equal(ours.self_attn.qkv_proj.weight.cpu(), rows)
        assert torch.equal(ours.mlp.down_proj.weight.cpu(), theirs.mlp.down_proj.weight)
    assert all(p.is_cuda for p in decoder.parameters())


def test_four_bit_weights(tmp_path):
    make_checkpoint(tmp_path, "llama")
    tensors = quantize_checkpoint(tmp_path)
    for index, layer in enumerate(load(tmp_path).layers):
        qkv, gate_up = layer.self_attn.qkv_proj.w4, layer.mlp.gate_up_proj.w4
        assert qkv.qweight.is_cuda
        assert torch.equal(dequantize_w4(qkv).cpu(), fused(tensors, index, *QKV))
        assert torch.equal(dequantize_w4(gate_up).cpu(), fused(tensors, index, *GATE_UP))


def test_a_damaged_tensor_is_named(tmp_path):
    make_checkpoint(tmp_path, "llama")
    quantize_checkpoint(tmp_path)
    name = "model.layers.1.self_attn.v_proj.scales"
    scales = load_file(tmp_path / WHOLE)[name]
    scales[0, 5] = torch.inf
    edit(tmp_path, **{name: scales})
    with pytest.raises(UserError, match=f"{name} contains NaN or infinity"):
        load(tmp_path)


def test_memory_while_and_after_loading(tmp_path):
    folder = tmp_path / "model"
    write_random_checkpoint(str(folder), "qwen2.5-0.5b", "awq")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    reserved = torch.cuda.memory_reserved()
    decoder = load(folder)
    weights = decoder.weight_bytes()
    assert torch.cuda.memory_allocated() - before < weights + (32 << 20)  # rotary tables
    assert torch.cuda.memory_reserved() - reserved < weights + (96 << 20)
    assert torch.cuda.max_memory_allocated() - before < weights + (192 << 20)
