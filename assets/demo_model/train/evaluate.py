"""What the freshly trained network says and knows: greedy answers and held-out perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from assets.demo_model.train.conversation import END_OF_TEXT, IM_END, Conversation, Message
from assets.demo_model.train.network import Llama


@dataclass(frozen=True)
class Perplexity:
    """``nats`` a token, the perplexity it means, and bits a byte, over ``tokens`` tokens."""

    tokens: int
    nats: float
    perplexity: float
    bits_per_byte: float


@torch.no_grad()
def perplexity(model: Llama, tokenizer: Tokenizer, file: Path, context: int) -> Perplexity:
    """Perplexity of a text file, cut into windows of ``context`` tokens."""
    text = file.read_text(encoding="utf-8")
    device = next(model.parameters()).device
    ids = torch.tensor(tokenizer.encode(text).ids, device=device)
    total, count = 0.0, 0
    for window in ids.split(context):
        if len(window) < 2:
            continue
        logits = model(window[None, :-1]).float()
        total += F.cross_entropy(logits[0], window[1:], reduction="sum").item()
        count += len(window) - 1
    nats = total / count
    bits = total / math.log(2) / len(text.encode("utf-8"))
    return Perplexity(count, nats, math.exp(nats), bits)


@torch.no_grad()
def answers(
    model: Llama, tokenizer: Tokenizer, conversations: list[list[Message]], max_tokens: int = 160
) -> list[str]:
    """Greedy replies to conversations that end with a user message.

    Recomputes the whole prefix for each token: slow, but too plain to be wrong.
    """
    device = next(model.parameters()).device
    stop = {tokenizer.token_to_id(IM_END), tokenizer.token_to_id(END_OF_TEXT)}
    prompts = [
        tokenizer.encode(Conversation(list(c)).text() + "<|im_start|>assistant\n").ids
        for c in conversations
    ]
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    width = int(lengths.max()) + max_tokens
    tokens: Tensor = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    open_rows = torch.ones(len(prompts), dtype=torch.bool, device=device)
    rows = torch.arange(len(prompts), device=device)
    stops = torch.tensor(sorted(stop), device=device)
    for _ in range(max_tokens):
        # Causal: what stands right of a row's end cannot change its next token.
        logits = model(tokens[:, : int(lengths.max())])[rows, lengths - 1]
        chosen = logits.argmax(-1)
        open_rows &= ~torch.isin(chosen, stops)
        if not open_rows.any():
            break
        tokens[rows[open_rows], lengths[open_rows]] = chosen[open_rows]
        lengths[open_rows] += 1
    return [
        tokenizer.decode(tokens[row, len(prompt) : lengths[row]].tolist())
        for row, prompt in enumerate(prompts)
    ]
