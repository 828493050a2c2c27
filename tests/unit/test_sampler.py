"""The sampler against distributions written out by hand.

A token is drawn by inverting the cumulative distribution at one uniform number, so feeding an even
grid of numbers instead of random ones must reproduce every probability to the grid's width.
"""

from __future__ import annotations

import random

import pytest
import torch

from backend.config import SamplingParams
from backend.engine import sampler
from backend.engine.types import Request, Sequence

GRID = 2000


class Grid(random.Random):
    """Even numbers between 0 and 1, in order."""

    def __init__(self) -> None:
        super().__init__(0)
        self._next = 0.5 / GRID

    def random(self) -> float:
        value, self._next = self._next, self._next + 1.0 / GRID
        return value


def sequence(prompt=(1, 2), reply=(), source=None, **sampling) -> Sequence:
    made = Request("a", list(prompt), SamplingParams(**sampling), [0])
    stop = frozenset() if sampling.get("ignore_eos") else frozenset([0])
    return Sequence(made, [*prompt, *reply], stop, 100, source or random.Random(0))


def drawn_distribution(logits: torch.Tensor, **sampling) -> torch.Tensor:
    seq = sequence(source=Grid(), **{"temperature": 1.0, "top_p": 1.0, **sampling})
    counts = torch.zeros(logits.numel())
    for _ in range(GRID):
        counts[sampler.sample(logits.clone().unsqueeze(0), [seq])[0].token_id] += 1
    return counts / GRID


def expected_distribution(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> torch.Tensor:
    """Temperature, top-k, top-p, min-p one after the other, token by token."""
    probs = (logits / temperature).softmax(-1)
    order = sorted(range(probs.numel()), key=lambda i: -probs[i])
    kept = order[: top_k or None]
    total, reached, nucleus = sum(float(probs[i]) for i in kept), 0.0, []
    for i in kept:
        if reached >= top_p * total and nucleus:
            break
        nucleus.append(i)
        reached += float(probs[i])
    nucleus = [i for i in nucleus if probs[i] >= min_p * probs[order[0]]]
    result = torch.zeros_like(probs)
    result[nucleus] = probs[nucleus] / probs[nucleus].sum()
    return result


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_k": 1},
        {"top_p": 0.7},
        {"top_p": 0.0},
        {"min_p": 0.3},
        {"top_k": 5, "top_p": 0.6, "temperature": 1.7},
        {"top_p": 0.95, "min_p": 0.1},
        {"top_k": 10_000},
    ],
)
def test_distribution(sampling):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(5)) * 2
    given = drawn_distribution(logits, **sampling)
    assert torch.allclose(given, expected_distribution(logits, **sampling), atol=2 / GRID)


@pytest.mark.parametrize(
    "sampling",
    [
        {"top_p": 0.97},
        {"top_k": 400, "top_p": 0.9},
        {"top_p": 0.5},
        {"min_p": 0.02},
    ],
)
def test_more_candidates_than_the_first_look_takes(sampling):
    """A flat distribution over 600 tokens: 256 of them do not hold the probability asked for."""
    logits = torch.randn(600, generator=torch.Generator().manual_seed(6)) * 0.3
    given = drawn_distribution(logits, **sampling)
    assert torch.allclose(given, expected_distribution(logits, **sampling), atol=2 / GRID)


def test_greedy_takes_the_likeliest_and_needs_no_random_number():
    seq = sequence(temperature=0.0, source=None)
    state = seq.random.getstate()
    assert sampler.sample(torch.tensor([[0.1, 3.0, 2.9]]), [seq])[0].token_id == 1
    assert seq.random.getstate() == state


def test_a_seed_means_the_same_alone_and_in_a_batch():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(1))

    def draw(rows: list[int]) -> dict[int, int]:
        seqs = [sequence(temperature=1.5, source=random.Random(row)) for row in rows]
        drawn = sampler.sample(logits[rows].clone(), seqs)
        return {row: sampled.token_id for row, sampled in zip(rows, drawn)}

    together = draw([0, 1, 2, 3, 4])
    assert all(draw([row])[row] == together[row] for row in range(5))


def test_repetition_penalty_counts_prompt_and_reply():
    logits = torch.tensor([[1.0, 2.0, -1.0, 0.5]])
    seq = sequence(prompt=(1, 1), reply=(2, 1, 2), repetition_penalty=2.0)  # each counts once
    sampler._adjust(logits[0], seq)
    assert logits.tolist() == [[1.0, 1.0, -2.0, 0.5]]


def test_presence_and_frequency_count_the_reply_only():
    logits = torch.zeros(1, 4)
    seq = sequence(prompt=(0, 0), reply=(1, 2, 2), presence_penalty=0.5, frequency_penalty=0.25)
    sampler._adjust(logits[0], seq)
    assert logits.tolist() == [[0.0, -0.75, -1.0, 0.0]]


def test_bias_can_force_and_ban():
    seq = sequence(temperature=0.0, logit_bias={3: 100.0})
    assert sampler.sample(torch.zeros(1, 4), [seq])[0].token_id == 3
    seq = sequence(temperature=0.0, logit_bias={1: -100.0})
    assert sampler.sample(torch.tensor([[0.0, 5.0, 1.0]]), [seq])[0].token_id == 2


def test_stop_tokens_cannot_come_before_min_tokens():
    logits = torch.tensor([[9.0, 1.0, 0.0]])
    early = sequence(temperature=0.0, min_tokens=2, reply=(1,))
    assert sampler.sample(logits.clone(), [early])[0].token_id == 1
    late = sequence(temperature=0.0, min_tokens=2, reply=(1, 1))
    assert sampler.sample(logits.clone(), [late])[0].token_id == 0


def test_logprobs_are_the_models_own():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    expected = logits.log_softmax(-1)[0]
    seq = sequence(temperature=0.0, logprobs=2, logit_bias={0: 50.0})
    drawn = sampler.sample(logits.clone(), [seq])[0]
    assert drawn.token_id == 0 and drawn.logprob is not None
    assert drawn.logprob.logprob == pytest.approx(float(expected[0]))
    assert [token for token, _ in drawn.logprob.top] == [1, 2]
    assert drawn.logprob.top[0][1] == pytest.approx(float(expected[1]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("damage", [torch.nan, torch.inf, -torch.inf])
def test_damaged_logits_fail_alone(temperature, damage):
    logits = torch.zeros(2, 8)
    logits[0] = damage
    seqs = [sequence(temperature=temperature) for _ in range(2)]
    bad, good = sampler.sample(logits, seqs)
    assert bad.token_id == -1 and 0 <= good.token_id < 8


@pytest.mark.parametrize("temperature", [1e-5, 1e-40, 1e-300])
def test_tiny_temperature_is_greedy(temperature):
    assert drawn_distribution(torch.tensor([1.0, 1.001, 0.0]), temperature=temperature)[1] == 1.0


@pytest.mark.parametrize(
    "sampling",
    [
        dict(repetition_penalty=1.5),
        dict(presence_penalty=1.0),
        dict(frequency_penalty=1.0),
        dict(logit_bias={1: 2.0}),
        dict(min_tokens=5),
    ],
)
def test_logits_of_a_model_can_be_adjusted(sampling):
    with torch.inference_mode():  # as the model runner makes them
        logits = torch.zeros(1, 4)
    seq = sequence(reply=(1,), temperature=1.0, **sampling)
    assert 0 <= sampler.sample(logits, [seq])[0].token_id < 4
