"""Float32 logits against transformers: every family and rope scaling, through the paged pools."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from backend.layers.parallel import ParallelContext
from backend.models.loader import load_model
from kernels.ops import KVCache
from tests.ops.paged_batches import layout
from tests.tiny_model import FAMILIES, LLAMA3_ROPE, make_checkpoint, make_model

CPU = torch.device("cpu")
BLOCK_SIZE = 8
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    original_max_position_embeddings=64,
    short_factor=[1.0 + 0.02 * i for i in range(8)],
    long_factor=[1.0 + 0.5 * i for i in range(8)],
)
ROPES = {
    "linear": dict(rope_type="linear", rope_theta=5000.0, factor=2.5),
    "dynamic": dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0),
    "llama3": LLAMA3_ROPE,
    "yarn": YARN,
    "yarn_mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4, "beta_fast": 16, "beta_slow": 2},
    "yarn_untruncated": {**YARN, "truncate": False, "attention_factor": 1.3},
    "longrope": LONGROPE,
    "longrope_factor": {**LONGROPE, "factor": 8.0},
}
OTHERS = {
    "llama_biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama_mha": ("llama", dict(num_key_value_heads=4)),
    "llama_mqa": ("llama", dict(num_key_value_heads=1, head_dim=24)),
    "mistral_no_window": ("mistral", dict(sliding_window=None)),
    "qwen2_no_window": ("qwen2", dict(use_sliding_window=False, tie_word_embeddings=True)),
    "qwen3_biases": ("qwen3", dict(attention_bias=True, tie_word_embeddings=False)),
    "qwen3_layer_types": (
        "qwen3",
        dict(
            use_sliding_window=True,
            sliding_window=12,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
}


def paged_logits(
    folder: Path,
    ids: torch.Tensor,
    cuts: list[int],
    scattered: bool,
    session_len: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Logits of every position of `ids`, computed in chunks that end at `cuts`."""
    decoder, config = load_model(str(folder), dtype, CPU, ParallelContext(), session_len)
    length = len(ids)
    _, slots = layout([length], [length], BLOCK_SIZE, scattered, seed=7)
    shape = (decoder.num_kv_heads, slots, config.head_dim)
    # Slots that were not written must not matter.
    kv_caches = [
        KVCache(*(torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)))
        for _ in range(config.num_layers)
    ]
    rows = []
    start = 0
    for end in cuts:
        metadata = layout([end - start], [end], BLOCK_SIZE, scattered, seed=7, blocks_for=length)[0]
        positions = torch.arange(start, end)
        with torch.inference_mode():
            step = decoder.rotary.step_of(length)
            hidden = decoder(ids[start:end], positions, kv_caches, metadata, step)
            rows.append(decoder.compute_logits(hidden))
        start = end
    return torch.cat(rows)


def ids_of(length: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed))


def check(model, folder, ids, cuts, scattered, session_len=None):
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    logits = paged_logits(folder, ids, cuts, scattered, session_len)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return make_checkpoint(folder, request.param, shard_size="100KB"), folder


@pytest.mark.parametrize("scattered", [False, True])
def test_prefill_then_decode(checkpoint, scattered):
    model, folder = checkpoint
    check(model, folder, ids_of(60), [40, *range(41, 61)], scattered)


@pytest.mark.parametrize("scattered", [False, True])
def test_chunks(checkpoint, scattered):
    model, folder = checkpoint
    check(model, folder, ids_of(90), [1, 17, 40, 41, 90], scattered)


@pytest.mark.parametrize("name", ROPES)
def test_rope_scalings(tmp_path, name):
    model = make_checkpoint(tmp_path, "llama", rope_parameters=dict(ROPES[name]))
    # Within the original context; test_long_context.py goes beyond.
    check(model, tmp_path, ids_of(60), [50, *range(51, 61)], scattered=False)


@pytest.mark.parametrize("name", OTHERS)
def test_variants(tmp_path, name):
    family, overrides = OTHERS[name]
    model = make_checkpoint(tmp_path, family, **overrides)
    check(model, tmp_path, ids_of(50), [37, *range(38, 51)], scattered=True)


def test_rope_spelled_as_before_transformers_5(tmp_path):
    """rope_theta and rope_scaling with "type" mean what rope_parameters means."""
    model = make_checkpoint(tmp_path, "llama", rope_parameters=dict(ROPES["linear"]))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    config["rope_theta"] = 5000.0
    config["rope_scaling"] = {"type": "linear", "factor": 2.5}
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))
    check(model, tmp_path, ids_of(20), [20], scattered=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(tmp_path, dtype):
    make_checkpoint(tmp_path, "llama")
    model = make_model("llama")
    ids = ids_of(40)
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    logits = paged_logits(tmp_path, ids, [30, *range(31, 41)], False, dtype=dtype)
    error = (logits - expected).norm() / expected.norm()
    assert error < (0.1 if dtype is torch.bfloat16 else 0.02)
