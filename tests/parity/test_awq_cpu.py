"""4-bit checkpoints in bfloat16 on a CPU: 4 bits in memory, and no further from float32 than 16."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from backend.layers.methods.awq import AWQMethod
from backend.layers.parallel import ParallelContext
from backend.models import loader
from kernels import ops
from tests.gpu.test_quality import merge_shards
from tests.parity.test_engine import DEMO, drain, engine_for, made, prompts
from tests.parity.test_logits import paged_logits
from tests.tiny_model import make_checkpoint
from tests.unit.test_awq import GATE_UP, GROUP, QKV, fused, quantize_checkpoint

CPU = torch.device("cpu")
LENGTH, PREFILL = 96, 80
CUTS = [PREFILL, *range(PREFILL + 1, LENGTH + 1)]  # a prompt, then token by token


def load(folder: Path, parallel: ParallelContext | None = None, dtype=torch.bfloat16):
    return loader.load_model(str(folder), dtype, CPU, parallel or ParallelContext())[0]


def weights_of(layer) -> Tensor:
    """What the layer multiplies by, through the op: [out, in]."""
    return ops.linear_w4(torch.eye(layer.in_features).bfloat16(), layer.w4, None).t().float()


def close(found: Tensor, expected: Tensor) -> None:
    """Scales and weights are rounded to bfloat16; what is not of its group is far off."""
    torch.testing.assert_close(found, expected, atol=float(expected.abs().max()) * 6e-3, rtol=0)


@pytest.mark.parametrize("rank, ranks", [(0, 1), (1, 2)])
def test_fused_layers_and_slices_are_one_packed_matrix(tmp_path, rank, ranks):
    make_checkpoint(tmp_path, "llama")
    tensors = quantize_checkpoint(tmp_path)
    for index, layer in enumerate(load(tmp_path, ParallelContext(rank, ranks)).layers):
        for names, found in (
            (QKV, layer.self_attn.qkv_proj), (GATE_UP, layer.mlp.gate_up_proj),
        ):  # fmt: skip
            parts = [fused(tensors, index, name).chunk(ranks)[rank] for name in names]
            close(weights_of(found), torch.cat(parts))
        down = fused(tensors, index, "mlp.down_proj").chunk(ranks, dim=1)[rank]
        close(weights_of(layer.mlp.down_proj), down)


def test_more_outputs_than_are_packed_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("backend.layers.methods.awq.RUN_OUTPUTS", 64)
    make_checkpoint(tmp_path, "llama", intermediate_size=160)
    tensors = quantize_checkpoint(tmp_path)
    layer = load(tmp_path).layers[0].mlp.gate_up_proj
    assert layer.w4.out_features == 320
    close(weights_of(layer), fused(tensors, 0, *GATE_UP))


@pytest.mark.parametrize("biases", [{}, {"mlp_bias": True, "attention_bias": True}])
def test_replies_of_the_engine(tmp_path, monkeypatch, biases):
    """Those of the unpacked weights, as far as two roundings agree: half of the first tokens."""
    make_checkpoint(tmp_path, "llama", **biases)
    quantize_checkpoint(tmp_path)

    def replies() -> list[list[int]]:
        engine = engine_for(tmp_path, dtype="bfloat16")
        for index, prompt in enumerate(prompts()):
            engine.add_request(made(index, prompt))
        return drain(engine)

    packed = replies()
    monkeypatch.setattr(
        loader, "linear_method", lambda config, dtype, device: AWQMethod(GROUP, (), dtype)
    )
    same = [a[0] == b[0] for a, b in zip(packed, replies(), strict=True)]
    assert sum(same) * 2 >= len(same)


@pytest.fixture(scope="module", params=[128, 32])
def quantized(request, tmp_path_factory):
    """The bundled model in 4 bits: its folder, group size, and float32 model of those weights."""
    folder = tmp_path_factory.mktemp("quantized") / "awq"
    shutil.copytree(DEMO, folder)
    merge_shards(folder)
    exact = quantize_checkpoint(folder, request.param)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(DEMO)).float().eval()
    model.load_state_dict({k: v.float() for k, v in exact.items()}, strict=False)
    model.tie_weights()
    return folder, request.param, model


def divergence(model, folder: Path, ids: Tensor) -> float:
    """Mean KL of the engine's model in bfloat16 from `model`, nats a token."""
    with torch.inference_mode():
        expected = model(ids[None]).logits[0].double().log_softmax(-1)
    found = paged_logits(folder, ids, CUTS, scattered=True, dtype=torch.bfloat16)
    return float((expected.exp() * (expected - found.double().log_softmax(-1))).sum(-1).mean())


def test_plain_torch_operations_read_the_4_bits_too(tmp_path):
    make_checkpoint(tmp_path, "llama")
    quantize_checkpoint(tmp_path)
    replies = []
    for kernels in ("auto", "reference"):  # in float32 the CPU's own form is the unpacked weight
        engine = engine_for(tmp_path, kernels=kernels)
        engine.add_request(made(0, prompts()[1]))
        replies.append(drain(engine))
    assert replies[0] == replies[1]
    assert engine.runner.model.layers[0].mlp.down_proj.w4.qweight.dtype == torch.int32


def test_it_diverges_by_less_than_a_ten_thousandth(quantized):
    folder, _, model = quantized
    ids = torch.randint(300, 6000, (LENGTH,), generator=torch.Generator().manual_seed(2))
    assert divergence(model, folder, ids) < 1e-4


def test_on_text_4_bits_diverge_no_more_than_16(quantized, monkeypatch):
    """There bfloat16 activations alone cost 2e-4 to 4e-4."""
    folder, group_size, model = quantized
    text = (DEMO.parents[1] / "docs" / "engine.md").read_text()
    ids = torch.tensor(Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(text).ids[:LENGTH])
    packed = divergence(model, folder, ids)
    monkeypatch.setattr(
        loader, "linear_method", lambda config, dtype, device: AWQMethod(group_size, (), dtype)
    )
    assert packed < divergence(model, folder, ids) + 1e-4


def test_weights_take_4_bits_of_memory(quantized):
    folder, group_size, _ = quantized
    decoder, unpacked = load(folder), load(folder, dtype=torch.float32)
    in_4_bits = [layer for layer in decoder.modules() if hasattr(layer, "w4")]
    assert len(in_4_bits) == 4 * len(decoder.layers)
    count = sum(layer.in_features * layer.out_features for layer in in_4_bits)
    # Outputs of the bundled model are whole blocks: nothing is padded.
    saved = unpacked.weight_bytes() / 2 - decoder.weight_bytes()  # all else is halved by bfloat16
    assert saved == 2 * count - (count // 2 + 4 * count // group_size)
