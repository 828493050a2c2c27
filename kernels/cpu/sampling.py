"""Sampling on a CPU: sorting a whole vocabulary is the costly part of top-p, so it is avoided."""

from __future__ import annotations

import torch
from torch import Tensor

import kernels.reference
from kernels.reference import invert

# Try the likeliest few first, which is exact whenever they hold the probability asked for.
FIRST_CANDIDATES = 256


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
) -> Tensor:
    """See `kernels.ops.sample`. Which of equal probabilities ranks first is torch's choice."""
    best, greedy = logits.max(dim=-1)
    drawn = temperature > 0
    if not bool(drawn.any()):
        return torch.where(torch.isfinite(best), greedy, -1)
    vocab = logits.shape[-1]
    everything = (top_k >= vocab) & (top_p >= 1.0) & (min_p == 0.0) | ~drawn
    probs = ((logits - best[:, None]) / temperature.clamp(min=1e-30)[:, None]).softmax(-1)
    if bool(everything.all()):
        tokens = invert(probs, uniform)
    else:
        width = min(vocab, FIRST_CANDIDATES)
        ranked, ids = probs.topk(width)
        enough = (top_k < width) | ((top_k >= vocab) & (ranked.sum(-1) > top_p))
        if width < vocab and not bool((enough | ~drawn).all()):
            arguments = (logits, temperature, top_k, top_p, min_p, uniform)
            return kernels.reference.sample(*arguments)
        rank = torch.arange(width)
        ranked = ranked.masked_fill(rank >= top_k[:, None], 0.0)
        total = torch.where(top_k >= vocab, 1.0, ranked.sum(-1))
        before = ranked.cumsum(-1) - ranked
        keep = (before < (top_p * total)[:, None]) & (ranked >= min_p[:, None] * ranked[:, :1])
        keep[:, 0] = True
        ids, order = ids.sort(dim=-1)  # the vocabulary's order
        chosen = invert((ranked * keep).gather(1, order), uniform)
        tokens = ids.gather(1, chosen[:, None]).squeeze(1)
    tokens = torch.where(drawn, tokens, greedy)
    return torch.where(torch.isfinite(best), tokens, -1)
