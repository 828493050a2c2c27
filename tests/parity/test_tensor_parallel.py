"""Two ranks over gloo compute the logits of one: every family, and what does not divide evenly."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

from backend.errors import UserError
from backend.layers.parallel import ParallelContext
from backend.models.loader import load_model
from kernels.ops import KVCache
from tests.ops.paged_batches import layout
from tests.tiny_model import FAMILIES, make_checkpoint

CPU = torch.device("cpu")
CASES = {
    **{family: (family, {}) for family in FAMILIES},
    "shared_kv_head": ("llama", dict(num_key_value_heads=1)),
    "odd_vocabulary": ("llama", dict(vocab_size=321)),
    "odd_tied_vocabulary": ("qwen3", dict(vocab_size=321)),
    "biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
}


def logits_of(folder: Path, parallel: ParallelContext) -> torch.Tensor:
    """Logits of a prompt and of three tokens decoded after it."""
    decoder, config = load_model(str(folder), torch.float32, CPU, parallel)
    ids = torch.randint(0, 256, (33,), generator=torch.Generator().manual_seed(1))
    slots = layout([33], [33], 8, True, seed=2)[1]
    shape = (decoder.num_kv_heads, slots, config.head_dim)
    kv_caches = [KVCache(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_layers)]
    rows = []
    for start, end in ((0, 30), (30, 31), (31, 32), (32, 33)):
        metadata = layout([end - start], [end], 8, True, seed=2, blocks_for=33)[0]
        with torch.inference_mode():
            hidden = decoder(ids[start:end], torch.arange(start, end), kv_caches, metadata)
            rows.append(decoder.compute_logits(hidden))
    return torch.cat(rows)


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    parallel = ParallelContext.connect(rank, 2, f"file://{folder / 'rendezvous'}", CPU, 60.0)
    found = {name: logits_of(folder / name, parallel) for name in CASES}
    torch.save(found, folder / f"rank{rank}.pt")
    parallel.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tp")
    for name, (family, overrides) in CASES.items():
        make_checkpoint(folder / name, family, **overrides)
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=run_rank, args=(rank, folder)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
    assert [process.exitcode for process in ranks] == [0, 0]
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_compute_what_one_does(folder, name, rank):
    logits = torch.load(folder / f"rank{rank}.pt", weights_only=True)[name]
    expected = logits_of(folder / name, ParallelContext())
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "overrides, ranks, words",
    [
        ({}, 3, "tp 3 is no multiple of the model's 2 KV heads"),
        (dict(num_key_value_heads=1), 3, "tp 3 does not divide the model's 4 attention heads"),
        (dict(num_key_value_heads=4, intermediate_size=130), 4, "tp 4 does not divide"),
        (dict(num_attention_heads=6, num_key_value_heads=3, head_dim=8), 2, "3 KV heads"),
        (dict(num_attention_heads=12, num_key_value_heads=3, head_dim=8), 4, "3 KV heads"),
    ],
)
def test_ranks_that_do_not_divide_the_model(tmp_path, overrides, ranks, words):
    size = 48 if "head_dim" in overrides else 64
    make_checkpoint(tmp_path, "llama", hidden_size=size, **overrides)
    with pytest.raises(UserError, match=words) as caught:
        load_model(str(tmp_path), torch.float32, CPU, ParallelContext(0, ranks))
    assert caught.value.field == "tp"
