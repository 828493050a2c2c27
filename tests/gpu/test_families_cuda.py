"""Families with layouts of their own, loaded by several threads: the same weights as on a CPU."""

from __future__ import annotations

import pytest
import torch

from backend.layers.parallel import ParallelContext
from backend.models.loader import load_model
from kernels.packing import dequantize_w4
from tests.family_layouts import make_family

CUDA = torch.device("cuda")


@pytest.mark.parametrize("family", ["internlm2_biases", "baichuan2", "qwen"])
@pytest.mark.parametrize("awq", [False, True], ids=["16_bit", "4_bit"])
def test_weights(tmp_path, family, awq):
    model = make_family(tmp_path, family, awq=awq)
    dtype = torch.float16 if awq else torch.float32
    decoder = load_model(str(tmp_path), dtype, CUDA, ParallelContext())[0]
    for theirs, ours in zip(model.model.layers, decoder.layers, strict=True):
        parts = theirs.self_attn.q_proj, theirs.self_attn.k_proj, theirs.self_attn.v_proj
        qkv = ours.self_attn.qkv_proj
        weight = dequantize_w4(qkv.w4) if awq else qkv.weight
        assert weight.is_cuda
        assert torch.equal(weight.cpu(), torch.cat([part.weight for part in parts]))
        if qkv.bias is not None:
            biases = torch.cat([part.bias for part in parts])
            torch.testing.assert_close(qkv.bias.cpu(), biases.to(dtype), atol=0, rtol=0)
    head = model.lm_head.weight.to(dtype)
    torch.testing.assert_close(decoder.lm_head.weight.cpu(), head, atol=1e-3, rtol=0)
