"""Perplexity of texts longer than a model was trained for, with and without dynamic NTK.

    python -m tests.bench.long_context [MODEL] [--times 1 3] [--windows 8] [--device cpu]

Each window is a run of the bundled held-out text (English, then Chinese, its documents one after
another), as many times as long as the trained length. All are computed as one prompt each, and the
last `trained length / 2` tokens of every window are what counts: the same tokens of the same text
at each length, only with more, or less, before them.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from backend.layers.parallel import ParallelContext
from backend.models.loader import load_model
from backend.models.long_context import LongContext
from backend.models.registry import read_model_config
from backend.tokenizer import Tokenizer
from kernels.ops import AttentionMetadata, KVCache
from quantize.evaluate import HELDOUT, HELDOUT_FILES, pick_device, pick_dtype

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo_model"
SETTINGS = {
    "unscaled": LongContext(0.0, False),
    "rope_scaling_factor 1.0": LongContext(1.0, False),
    "rope_scaling_factor 1.0, use_logn_attn": LongContext(1.0, True),
}
BLOCK = 64


def held_out_ids(folder: str) -> list[int]:
    """All documents, English and Chinese in turn."""
    texts = [
        (HELDOUT / name).read_text(encoding="utf-8").split(mark)
        for name, mark in HELDOUT_FILES.items()
    ]
    documents = [text.strip() for row in zip_longest(*texts) for text in row if text]
    return Tokenizer.from_folder(folder).encode("\n\n".join(filter(None, documents)))


@torch.inference_mode()
def nats(
    folder: str, windows: list[list[int]], counted: int, setting: LongContext, device: torch.device
) -> float:
    """Mean negative log-likelihood of each window's last `counted` tokens."""
    length = len(windows[0]) - 1
    dtype = pick_dtype("auto", device, folder)
    decoder, config = load_model(
        folder, dtype, device, ParallelContext(), length, long_context=setting
    )
    slots = -(-length // BLOCK) * BLOCK

    def pool() -> Tensor:
        size = (decoder.num_kv_heads, slots, config.head_dim)
        return torch.zeros(size, dtype=dtype, device=device)

    caches = [KVCache(pool(), pool()) for _ in range(config.num_layers)]
    positions = torch.arange(length, device=device)
    metadata = AttentionMetadata(
        slot_mapping=positions,
        block_table=torch.arange(slots // BLOCK, dtype=torch.int32, device=device)[None],
        cu_seqlens_q=torch.tensor([0, length], dtype=torch.int32, device=device),
        seq_lens_k=torch.tensor([length], dtype=torch.int32, device=device),
        query_lens=[length], seq_lens=[length], kv_runs=[[(0, length)]], block_size=BLOCK,
        max_query_len=length, max_seq_len=length,
    )  # fmt: skip
    total = 0.0
    for window in windows:
        ids = torch.tensor(window, device=device)
        metadata.derived.clear()
        step = decoder.rotary.step_of(length)
        hidden = decoder(ids[:-1], positions, caches, metadata, step)[-counted:]
        logits = decoder.compute_logits(hidden)
        loss = torch.nn.functional.cross_entropy(logits, ids[-counted:], reduction="sum")
        total += float(loss)
    return total / (counted * len(windows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=str(DEMO))
    parser.add_argument("--times", nargs="+", type=float, default=[1.0, 3.0])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    trained = read_model_config(args.model).max_position_embeddings
    counted = trained // 2
    ids = held_out_ids(args.model)
    lengths = [int(times * trained) for times in args.times]
    # Windows end at the same places whatever their length.
    longest = max(lengths)
    ends = [longest + 1 + i * counted for i in range(args.windows)]
    ends = [end for end in ends if end <= len(ids)]
    print(f"{args.model}: trained for {trained} tokens; {len(ends)} windows, {counted} tokens of "
          f"each counted, {device}", file=sys.stderr)  # fmt: skip
    print("| tokens | setting | nats a token | perplexity | above the trained length's |")
    print("|---|---|---|---|---|")
    base = None
    for length in lengths:
        windows = [ids[end - 1 - length : end] for end in ends]
        for name, setting in SETTINGS.items():
            start = time.perf_counter()
            found = nats(args.model, windows, counted, setting, device)
            base = found if base is None else base
            print(f"| {length} | {name} | {found:.4f} | {math.exp(min(found, 700)):.2f} | "
                  f"{found - base:+.4f} |", flush=True)  # fmt: skip
            print(f"{time.perf_counter() - start:.1f} s", file=sys.stderr)
            if length <= trained and setting is SETTINGS["unscaled"]:
                break  # the others are the same
    return 0


if __name__ == "__main__":
    sys.exit(main())
