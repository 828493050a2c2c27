"""Draw the next tokens from logits.

Order: penalties, logit bias, banned stops, then `kernels.ops.sample`: temperature, top-k, top-p,
min-p. A token is drawn by one uniform number per sequence from the sequence's own generator, so
that a seed gives the same reply in any batch. Log-probabilities reported are the model's own,
before all of this.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backend.config import SamplingParams
from backend.engine.types import DrawParams, SampledToken, Sequence, TokenLogprob
from kernels import ops


def draws_on_device(seq: Sequence) -> bool:
    """Whether `ops.sample` is all that this sequence's next token takes."""
    p = seq.request.sampling
    return p.logprobs is None and not p.logit_bias and not p.reads_reply and _may_stop(seq)


def draw_params(sequences: list[Sequence]) -> DrawParams:
    """What each sequence's next token is drawn with; takes a number from its generator."""
    draw = DrawParams()
    for seq in sequences:
        p = seq.request.sampling
        draw.temperature.append(p.temperature)
        draw.top_k.append(p.top_k)
        draw.top_p.append(p.top_p)
        draw.min_p.append(p.min_p)
        draw.uniform.append(_uniform(seq) if p.temperature > 0 else 0.0)
    return draw


def give_back(params: DrawParams, sequences: list[Sequence]) -> None:
    """Nothing was drawn with these after all: the numbers are the sequences' next ones again."""
    for seq, uniform in zip(sequences, params.uniform, strict=True):
        if seq.request.sampling.temperature > 0:
            seq.unused_uniforms.append(uniform)


def _uniform(seq: Sequence) -> float:
    """The sequence's next number in [0, 1), as float32 can hold it: it must not round up to 1."""
    if seq.unused_uniforms:
        return seq.unused_uniforms.pop()
    return min(seq.random.random(), 1 - 2**-24)


def draw(logits: Tensor, params: DrawParams) -> Tensor:
    """Token ids int64 [S] drawn from logits float32 [S, vocab]; -1 where they are not numbers."""
    vocab = logits.shape[-1]
    kept = [min(k or vocab, vocab) for k in params.top_k]
    floats = torch.tensor([params.temperature, params.top_p, params.min_p, params.uniform])
    temperature, top_p, min_p, uniform = to_device(floats, logits.device)
    top_k = to_device(torch.tensor(kept), logits.device)
    return ops.sample(logits, temperature, top_k, top_p, min_p, uniform)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor on its way to a device, without waiting for what the device does before."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


@torch.inference_mode()  # which the logits come from: only there may they be changed in place
def sample(logits: Tensor, sequences: list[Sequence]) -> list[SampledToken]:
    """One token for each row, with all that a request may ask for.

    Args:
        logits: float32 [num_sequences, vocab]; changed in place.
        sequences: in the order of the rows.
    """
    logprobs = _logprob_rows(logits, [seq.request.sampling for seq in sequences])
    for row, seq in enumerate(sequences):
        _adjust(logits[row], seq)
    ids: list[int] = draw(logits, draw_params(sequences)).tolist()
    sampled = [SampledToken(token) for token in ids]
    for row, (values, count) in logprobs.items():
        if ids[row] >= 0:
            sampled[row].logprob = _report(values, ids[row], count)
    return sampled


def _may_stop(seq: Sequence) -> bool:
    """Whether the reply is long enough to end at the next token."""
    known = seq.num_output_tokens + seq.num_pending_tokens
    return known >= seq.request.sampling.min_tokens or not seq.stop_ids


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
    if not _may_stop(seq):
        row[torch.tensor(sorted(seq.stop_ids), device=row.device)] = -torch.inf
