"""Draw the next tokens from logits.

Order: penalties, logit bias, banned stops, then temperature, top-k, top-p, min-p. A token is drawn
by one uniform number per sequence from the sequence's own generator (inverse of the cumulative
distribution), so that a seed gives the same reply in any batch. Log-probabilities reported are the
model's own, before all of this.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from backend.config import SamplingParams
from backend.engine.types import SampledToken, Sequence, TokenLogprob

# Sorting a whole vocabulary is the costly part of top-p: try the likeliest few first, which is
# exact whenever they hold the probability asked for.
FIRST_CANDIDATES = 256


@torch.inference_mode()  # which the logits come from: only there may they be changed in place
def sample(logits: Tensor, sequences: list[Sequence]) -> list[SampledToken]:
    """One token for each row.

    Args:
        logits: float32 [num_sequences, vocab]; changed in place.
        sequences: in the order of the rows.
    """
    params = [seq.request.sampling for seq in sequences]
    logprobs = _logprob_rows(logits, params)
    for row, seq in enumerate(sequences):
        _adjust(logits[row], seq)
    best, tokens = logits.max(dim=-1)
    finite = torch.isfinite(best).tolist()
    ids: list[int] = tokens.tolist()
    drawn = [row for row, p in enumerate(params) if p.temperature > 0 and finite[row]]
    if drawn:
        rows = logits if len(drawn) == len(params) else logits[drawn]
        uniforms = [sequences[row].random.random() for row in drawn]
        for row, token in zip(drawn, _draw(rows, [params[row] for row in drawn], uniforms)):
            ids[row] = token
    sampled = [SampledToken(token if ok else -1) for token, ok in zip(ids, finite)]
    for row, (values, count) in logprobs.items():
        if finite[row]:
            sampled[row].logprob = _report(values, ids[row], count)
    return sampled


def _logprob_rows(logits: Tensor, params: list[SamplingParams]) -> dict[int, tuple[Tensor, int]]:
    """row -> (log-probabilities [vocab], alternatives wanted), for the rows that want them."""
    rows = [row for row, p in enumerate(params) if p.logprobs is not None]
    if not rows:
        return {}
    values = torch.log_softmax(logits[rows], dim=-1)
    return {row: (values[i], params[row].logprobs or 0) for i, row in enumerate(rows)}


def _report(values: Tensor, token: int, count: int) -> TokenLogprob:
    top: list[tuple[int, float]] = []
    if count:
        best, ids = values.topk(min(count, values.numel()))
        top = list(zip(ids.tolist(), best.tolist()))
    return TokenLogprob(token, float(values[token]), top)


def _adjust(row: Tensor, seq: Sequence) -> None:
    """Bias, penalties and banned stop tokens, in place on logits [vocab]."""
    p = seq.request.sampling
    if p.repetition_penalty != 1.0:  # Keskar et al. 2019
        ids = torch.tensor(sorted(set(seq.token_ids)), device=row.device)
        seen = row[ids]
        row[ids] = torch.where(seen > 0, seen / p.repetition_penalty, seen * p.repetition_penalty)
    if (p.presence_penalty or p.frequency_penalty) and seq.num_output_tokens:
        reply = torch.tensor(seq.token_ids[seq.num_prompt_tokens :], device=row.device)
        ids, counts = reply.unique(return_counts=True)
        row[ids] -= p.presence_penalty + p.frequency_penalty * counts.to(row.dtype)
    if p.logit_bias:
        ids = torch.tensor(list(p.logit_bias), device=row.device)
        row[ids] += torch.tensor(list(p.logit_bias.values()), device=row.device)
    if seq.num_output_tokens < p.min_tokens and seq.stop_ids:
        row[torch.tensor(sorted(seq.stop_ids), device=row.device)] = -torch.inf


def _draw(logits: Tensor, params: list[SamplingParams], uniforms: list[float]) -> list[int]:
    """Token ids [n] drawn from logits [n, vocab]."""
    vocab = logits.shape[-1]

    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor([[v] for v in values], device=logits.device, dtype=torch.float32)

    # What float32 cannot hold would be 0, and divide nothing by nothing.
    temperature = column(max(p.temperature, 1e-30) for p in params)
    # Subtracting the maximum first keeps tiny temperatures from overflowing.
    probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    uniform = torch.tensor(uniforms, device=logits.device, dtype=torch.float64).unsqueeze(1)
    if all(p.top_k == 0 and p.top_p >= 1.0 and p.min_p == 0.0 for p in params):
        return _invert(probs, uniform).tolist()
    top_k = torch.tensor([[min(p.top_k or vocab, vocab)] for p in params], device=logits.device)
    top_p = column(p.top_p for p in params)
    min_p = column(p.min_p for p in params)
    width = min(vocab, FIRST_CANDIDATES)
    ranked, ids = probs.topk(width)
    reaches = (top_k == vocab) & (ranked.sum(-1, keepdim=True) > top_p)
    if width < vocab and not bool((reaches | (top_k <= width)).all()):
        ranked, ids = probs.sort(dim=-1, descending=True)
    rank = torch.arange(ranked.shape[-1], device=logits.device)
    ranked = ranked.masked_fill(rank >= top_k, 0.0)
    total = torch.where(top_k == vocab, 1.0, ranked.sum(-1, keepdim=True))
    before = ranked.cumsum(-1) - ranked  # a token stays if those before it do not reach top_p
    keep = (before < top_p * total) & (ranked >= min_p * ranked[:, :1])
    keep[:, 0] = True
    chosen = _invert(ranked * keep, uniform)
    return ids.gather(1, chosen.unsqueeze(1)).squeeze(1).tolist()


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """Indices [n] where cumulated weights [n, m] pass `uniform` [n, 1] of their total."""
    cumulated = weights.cumsum(-1, dtype=torch.float64)
    index = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True).squeeze(1)
    # Rounding may point past the last token that has any weight.
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).to(torch.uint8).argmax(-1)
    return torch.minimum(index, last)
