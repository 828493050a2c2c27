"""A whole model over windows of text and a few prompts, without the engine: one at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import psutil
import torch
from torch import Tensor

from backend.chat_template import ChatTemplate
from backend.layers.parallel import ParallelContext
from backend.models.checkpoint import read_checkpoint
from backend.models.decoder import Decoder
from backend.models.kv_params import BITS
from backend.models.loader import load_model
from backend.models.model_config import ModelConfig
from backend.tokenizer import Tokenizer
from kernels.ops import AttentionMetadata, KVCache
from quantize.blocks import BlockModel, propagate
from quantize.calibrate import embed_samples
from quantize.progress import Progress

PROMPTS = ("What is the KV cache?", "Write a short story about a fox.", "请用一句话介绍你自己。")
REPLY_TOKENS = 48
NO_REPLY = "(does not fit into memory whole, so it was run block by block and did not reply)"
BLOCK_SIZE = 64  # of the KV cache; the same for every device
SHARE = 0.8  # of the free memory that weights may take; the rest is for what is computed


@dataclass(frozen=True)
class KVFormat:
    """How a model's KV cache is kept while it is measured.

    Attributes:
        bits: 16 (the model's own format), 8 or 4.
        static: scales and zeros measured beforehand, float32 [layers, 2, KV heads, 2], as
            `backend.models.kv_params` has them; None computes them by token and head.
    """

    bits: int = 16
    static: Tensor | None = None

    @property
    def label(self) -> str:
        """What is said of it behind a model's name."""
        return "" if self.bits == 16 else f", KV in {self.bits} bits"


@dataclass(frozen=True)
class Window:
    """A run of one document's tokens: each but the first is predicted from those before it."""

    document: int
    ids: list[int]


@dataclass(frozen=True)
class ModelRun:
    """What is kept of a model that has been over the text.

    Attributes:
        head: rows of `hidden`, on the device, -> float32 logits [rows, vocab_size].
        hidden: one [len(window) - 1, hidden_size] on the host for each window.
    """

    head: Callable[[Tensor], Tensor]
    hidden: list[Tensor]
    memory_bytes: int
    replies: tuple[str, ...]
    seconds: float


def run_model(
    folder: str,
    windows: Sequence[Window],
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    kv: KVFormat,
) -> ModelRun:
    """Load a model, run it over all windows, let it reply to the fixed prompts, let go of it.

    A model that does not fit into memory whole is run block by block, and does not reply.
    """
    start = time.monotonic()
    if kv.bits == 16 and weight_bytes(folder, dtype, device) > free_bytes(device) * SHARE:
        return run_by_blocks(folder, windows, device, dtype, progress)
    tokenizer = Tokenizer.from_folder(folder)
    prompts = [prompt_ids(folder, tokenizer, prompt) for prompt in PROMPTS]
    longest = max(
        max(len(window.ids) for window in windows), max(map(len, prompts)) + REPLY_TOKENS
    )
    with torch.inference_mode():
        decoder, config = load_model(folder, dtype, device, ParallelContext(), longest)
        caches = _kv_caches(decoder, config, longest, dtype, device, kv)
        name = os.path.basename(os.path.abspath(folder))
        progress.stage(f"evaluate {name}", len(windows) + len(prompts))
        hidden = []
        for window in windows:
            hidden.append(_forward(decoder, window.ids[:-1], 0, caches, device).cpu())
            progress.step()
        replies = []
        for ids in prompts:
            replies.append(tokenizer.decode(_greedy(decoder, ids, tokenizer, caches, device)))
            progress.step()
    return ModelRun(
        decoder.lm_head, hidden, decoder.weight_bytes(), tuple(replies), time.monotonic() - start
    )


def run_by_blocks(
    folder: str,
    windows: Sequence[Window],
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> ModelRun:
    """The same for a model of which one block is in memory at a time."""
    start = time.monotonic()
    length = max(len(window.ids) for window in windows) - 1
    model = BlockModel(folder, device, dtype, length + 1)
    ids = torch.zeros(len(windows), length, dtype=torch.int64)  # what follows a text is not seen
    lengths = torch.tensor([len(window.ids) - 1 for window in windows])
    for row, window in zip(ids, windows):
        row[: len(window.ids) - 1] = torch.tensor(window.ids[:-1])
    hidden, size = embed_samples(model, ids, progress.note)
    progress.stage(f"evaluate {os.path.basename(os.path.abspath(folder))}", model.num_blocks)
    for index in range(model.num_blocks):
        block = model.load_block(index)
        size = propagate(model, block, hidden, size, progress.note, lengths)
        progress.step()
    rows = [
        hidden[slice(index, index + 1)][0, : len(window.ids) - 1].cpu()
        for index, window in enumerate(windows)
    ]
    used = weight_bytes(folder, dtype, device)
    return ModelRun(model.logits, rows, used, (NO_REPLY,) * len(PROMPTS), time.monotonic() - start)


def weight_bytes(folder: str, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of the weights of a checkpoint, loaded whole to compute in `dtype` on `device`."""
    total = 0
    for name, info in read_checkpoint(folder).items():
        count = prod(info.shape)
        if name.endswith(".qweight"):  # only a GPU keeps 4 bits
            total += 4 * count if device.type == "cuda" else 8 * count * dtype.itemsize
        else:
            total += count * (1 if info.dtype == "I8" else dtype.itemsize)
    return total


def free_bytes(device: torch.device) -> int:
    """Memory that is free on `device`, with what PyTorch has there and does not use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _kv_caches(
    decoder: Decoder,
    config: ModelConfig,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    kv: KVFormat,
) -> list[KVCache]:
    heads, slots = decoder.num_kv_heads, -(-tokens // BLOCK_SIZE) * BLOCK_SIZE
    size = config.head_dim // 2 if kv.bits == 4 else config.head_dim
    stored = dtype if kv.bits == 16 else torch.uint8

    def pool() -> Tensor:
        return torch.zeros(heads, slots, size, dtype=stored, device=device)

    def params(layer: int, which: int) -> Tensor | None:
        if kv.bits == 16:
            return None
        if kv.static is None:
            return torch.zeros(heads, slots, 2, dtype=torch.float16, device=device)
        by_head = kv.static[layer, which].clone()  # of 8 bits: the same range in as many steps
        by_head[:, 0] *= (2**BITS - 1) / (2**kv.bits - 1)
        by_head[:, 0].clamp_(min=1e-7)  # less is 0 in float16
        return by_head.to(device, torch.float16)[:, None].expand(-1, slots, -1)

    static = kv.static is not None and kv.bits != 16
    return [
        KVCache(pool(), pool(), kv.bits, params(layer, 0), params(layer, 1), static)
        for layer in range(config.num_layers)
    ]


def _forward(
    decoder: Decoder, ids: Sequence[int], start: int, caches: list[KVCache], device: torch.device
) -> Tensor:
    """Final hidden states [len(ids), hidden_size] of one sequence's tokens from `start` on.

    The KV of those before must be of the rotation's same step: see `RotaryEmbedding`.
    """
    count, end = len(ids), start + len(ids)
    positions = torch.arange(start, end, device=device)
    metadata = AttentionMetadata(
        slot_mapping=positions,
        block_table=torch.arange(-(-end // BLOCK_SIZE), dtype=torch.int32, device=device)[None],
        cu_seqlens_q=torch.tensor([0, count], dtype=torch.int32, device=device),
        seq_lens_k=torch.tensor([end], dtype=torch.int32, device=device),
        query_lens=[count],
        seq_lens=[end],
        kv_runs=[[(0, end)]],
        block_size=BLOCK_SIZE,
        num_decodes=int(count == 1),
        max_query_len=count,
        max_seq_len=end,
    )
    step = decoder.rotary.step_of(end)
    return decoder(torch.tensor(ids, device=device), positions, caches, metadata, step)


def _greedy(
    decoder: Decoder,
    prompt: list[int],
    tokenizer: Tokenizer,
    caches: list[KVCache],
    device: torch.device,
) -> list[int]:
    """The likeliest next token, again and again, up to REPLY_TOKENS or the reply's end."""
    ids, rotary, known = list(prompt), decoder.rotary, 0  # tokens whose KV is there
    while True:
        hidden = _forward(decoder, ids[known:], known, caches, device)
        token, known = int(decoder.compute_logits(hidden[-1:]).argmax()), len(ids)
        if token in tokenizer.eos_token_ids:
            return ids[len(prompt) :]
        ids.append(token)
        if len(ids) == len(prompt) + REPLY_TOKENS:
            return ids[len(prompt) :]
        if rotary.step_of(len(ids)) != rotary.step_of(known):
            known = 0  # a new step's frequencies are for all tokens


def prompt_ids(folder: str, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """As a chat, if the model has a template; else as plain text."""
    template = ChatTemplate.from_folder(folder)
    if template.source is None:
        return tokenizer.encode(prompt)
    try:
        return template.encode([{"role": "user", "content": prompt}], tokenizer)
    finally:
        template.close()
