"""Families that transformers has no code for: the logits and replies of the models they equal."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from backend.config import EngineConfig, SamplingParams
from backend.engine.types import Request
from backend.engine.worker import build_engine
from backend.errors import UserError
from backend.layers.methods.awq import AWQMethod
from backend.layers.parallel import ParallelContext
from backend.layers.rotary import QWEN_DYNAMIC
from backend.models import loader
from backend.models.registry import read_model_config
from tests.family_layouts import FAMILIES, make_family
from tests.parity.test_logits import ids_of, paged_logits
from tests.parity.test_tensor_parallel import CPU, logits_of
from tests.unit.test_awq import GROUP, edit_config

FUSED = ("internlm2", "internlm2_biases", "baichuan2", "qwen")


def check(model, folder):
    ids = ids_of(50)
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    logits = paged_logits(folder, ids, [20, 37, *range(38, 51)], scattered=True)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits(tmp_path, name):
    check(make_family(tmp_path, name), tmp_path)


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "packed"])
@pytest.mark.parametrize("name", FUSED)
def test_logits_of_4_bit_checkpoints(tmp_path, monkeypatch, name, packed):
    model = make_family(tmp_path, name, awq=True)
    if packed:  # as on a GPU, with the reference's product
        monkeypatch.setattr(
            loader, "linear_method", lambda config, dtype, device: AWQMethod(GROUP)
        )
    check(model, tmp_path)


@pytest.mark.parametrize("name", ["internlm_7b", "internlm2", "baichuan2", "qwen"])
def test_greedy_replies(tmp_path, name):
    model = make_family(tmp_path, name)
    prompt = ids_of(21).tolist()
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )[0, 21:].tolist()  # fmt: skip
    engine = build_engine(
        EngineConfig(model=str(tmp_path), dtype="float32", device="cpu", session_len=128)
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    engine.add_request(Request("0", prompt, sampling))
    reply: list[int] = []
    while engine.has_work():
        for output in engine.step():
            reply += output.token_ids
    assert reply == expected


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    parallel = ParallelContext.connect(rank, 2, f"file://{folder / 'rendezvous'}", CPU, 60.0)
    found = {name: logits_of(folder / name, parallel) for name in (*FUSED, "internlm2_awq")}
    torch.save(found, folder / f"rank{rank}.pt")
    parallel.close()


def test_two_ranks_compute_what_one_does(tmp_path):
    for name in FUSED:
        make_family(tmp_path / name, name)
    make_family(tmp_path / "internlm2_awq", "internlm2", awq=True)
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=run_rank, args=(rank, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
    assert [process.exitcode for process in ranks] == [0, 0]
    for rank in range(2):
        for name, logits in torch.load(tmp_path / f"rank{rank}.pt", weights_only=True).items():
            expected = logits_of(tmp_path / name, ParallelContext())
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_llamas_names_are_read_too(tmp_path):
    """Converted checkpoints keep the architecture and take Llama's names."""
    model = make_family(tmp_path, "internlm_20b")
    edit_config(tmp_path, architectures=["InternLM2ForCausalLM"])
    check(model, tmp_path)


def edited(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({k: t for k, t in tensors.items() if t is not None}, path)


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        loader.check_model(str(folder), ParallelContext())
    return str(caught.value)


def test_messages_name_what_the_checkpoint_holds(tmp_path):
    make_family(tmp_path, "internlm2")
    wqkv, w2 = "model.layers.1.attention.wqkv.weight", "model.layers.0.feed_forward.w2.weight"
    kept = load_file(tmp_path / "model.safetensors")
    edited(tmp_path, **{wqkv: None})
    assert f"lacks the tensor {wqkv}" in refused(tmp_path)
    edited(tmp_path, **{wqkv: kept[wqkv][:-16].contiguous()})
    assert f"{wqkv} has the shape [112, 64]" in refused(tmp_path)
    edited(tmp_path, **{wqkv: kept[wqkv], w2: kept[w2][:-1].contiguous()})
    assert f"{w2} has the shape [63, 128]" in refused(tmp_path)
    twice = "model.layers.0.mlp.down_proj.weight"
    edited(tmp_path, **{w2: kept[w2], twice: kept[w2].clone()})
    assert twice in (message := refused(tmp_path)) and w2 in message
    bad = kept[wqkv].clone()
    bad[5, 3] = torch.nan
    edited(tmp_path, **{twice: None, wqkv: bad})
    with pytest.raises(UserError, match=f"{wqkv} contains NaN"):
        loader.load_model(str(tmp_path), torch.float32, CPU, ParallelContext())


def test_4_bit_words_that_cross_heads_are_refused(tmp_path):
    make_family(tmp_path, "internlm2", awq=True)
    # Q, K and V have as many outputs as before, but a head is half a word.
    edit_config(tmp_path, head_dim=4, num_attention_heads=16, num_key_value_heads=8)
    assert "stores 8 outputs together, which heads of 4 do not fill" in refused(tmp_path)


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("baichuan2", dict(max_position_embeddings=None), "Baichuan 13B, which encodes positions"),
        ("internlm_7b", dict(rotary={"type": "yarn"}), "rotary: the type 'yarn' is unknown"),
        ("qwen", dict(seq_length="x"), "seq_length must be a whole number"),
        ("qwen", dict(rotary_pct=0.5), "rotary_pct is not supported"),
        ("qwen", dict(intermediate_size=255), "must be even"),
        ("qwen", dict(scale_attn_weights=False), "scale_attn_weights"),
    ],
)
def test_what_is_refused(tmp_path, name, changes, words):
    make_family(tmp_path, name)
    edit_config(tmp_path, **changes)
    assert words in refused(tmp_path)


def test_qwens_config(tmp_path):
    make_family(tmp_path, "qwen")
    config = read_model_config(str(tmp_path))
    assert config.max_position_embeddings == 256  # trained length, not the 1024 that NTK reaches
    assert config.use_logn_attn and config.rope.rope_type == QWEN_DYNAMIC
    edit_config(tmp_path, use_logn_attn=False, use_dynamic_ntk=False, dtype=None, bf16=True)
    config = read_model_config(str(tmp_path))
    assert not config.use_logn_attn and config.rope.rope_type == "default"
    assert config.dtype == "bfloat16"
