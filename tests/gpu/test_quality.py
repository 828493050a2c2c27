"""The engine's logits on a GPU against float32 on the weights that the checkpoint stands for."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from backend.layers.parallel import ParallelContext
from backend.models.loader import load_model
from kernels.ops import KVCache
from tests.ops.paged_batches import layout
from tests.unit.test_awq import quantize_checkpoint

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo_model"
LENGTH, PREFILL, BLOCK = 96, 80, 16
GPU = torch.device("cuda")


def metadata_of(query_len: int, seq_len: int):
    made, slots = layout([query_len], [seq_len], BLOCK, True, seed=3, blocks_for=LENGTH)
    moved = {
        name: getattr(made, name).to(GPU)
        for name in ("slot_mapping", "block_table", "cu_seqlens_q", "seq_lens_k")
    }
    shape = dict(num_decodes=int(query_len == 1), max_query_len=query_len, max_seq_len=seq_len)
    return replace(made, **moved, **shape), slots


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of every position: a prompt, then decoding token by token."""
    decoder, config = load_model(str(folder), torch.float16, GPU, ParallelContext())
    slots = metadata_of(1, 1)[1]
    shape = (decoder.num_kv_heads, slots, config.head_dim)
    pools = [
        KVCache(*(torch.full(shape, torch.nan, dtype=torch.float16, device=GPU) for _ in "kv"))
        for _ in range(config.num_layers)
    ]
    rows, start = [], 0
    for end in (PREFILL, *range(PREFILL + 1, LENGTH + 1)):
        positions = torch.arange(start, end, device=GPU)
        with torch.inference_mode():
            hidden = decoder(ids[start:end], positions, pools, metadata_of(end - start, end)[0])
            rows.append(decoder.compute_logits(hidden))
        start = end
    return torch.cat(rows).double().log_softmax(-1)


@pytest.mark.parametrize("group_size", [128, 64, 32])
def test_awq_diverges_by_less_than_a_ten_thousandth(tmp_path, group_size):
    folder = tmp_path / "awq"
    shutil.copytree(DEMO, folder)
    merge_shards(folder)
    exact = quantize_checkpoint(folder, group_size)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(DEMO)).float().eval()
    theirs.load_state_dict({k: v.float() for k, v in exact.items()}, strict=False)
    theirs.tie_weights()
    ids = torch.randint(300, 6000, (LENGTH,), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = theirs(ids[None]).logits[0].double().log_softmax(-1).to(GPU)
    found = logits_of(folder, ids.to(GPU))
    divergence = (expected.exp() * (expected - found)).sum(-1)
    assert float(divergence.mean()) < 1e-4


def merge_shards(folder: Path) -> None:
    """The bundled model has two files; the quantizer of the tests wants one."""
    from safetensors.torch import load_file, save_file

    shards = sorted(folder.glob("*.safetensors"))
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    for shard in shards:
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
