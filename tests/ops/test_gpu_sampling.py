"""Sampling in Triton against exact probabilities: on the GPU, or interpreted."""

from __future__ import annotations

import pytest
import torch

import kernels.reference
from tests.ops.gpu_device import DEVICE, ON_GPU

from kernels.gpu import sampling  # isort: skip  (gpu_device decides how Triton is imported)

GRID = 400 if ON_GPU else 12  # uniforms a case


def drawn(vocab, seed=0, spread=3.0):
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread


def sample(logits, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0, uniform=0.5):
    """Rows of one vocabulary; a number stands for every row."""
    rows, vocab = logits.shape
    columns = (
        (temperature, torch.float32),
        (vocab if top_k is None else top_k, torch.int64),
        (top_p, torch.float32),
        (min_p, torch.float32),
        (uniform, torch.float32),
    )
    tensors = [
        torch.as_tensor(value, dtype=dtype).to(DEVICE).expand(rows) for value, dtype in columns
    ]
    return sampling.sample(logits.to(DEVICE), *tensors)


def exact_weights(logits, temperature, top_k, top_p, min_p):
    """What stays of the probabilities, in float64, in the vocabulary's order."""
    probs = ((logits.double() - logits.double().max()) / temperature).softmax(-1)
    ranked, ids = probs.sort(descending=True, stable=True)
    if top_k is not None:
        ranked[top_k:] = 0.0
    before = ranked.cumsum(0) - ranked
    keep = (before < top_p * ranked.sum()) & (ranked >= min_p * ranked[0])
    keep[0] = True
    return torch.zeros_like(probs).scatter(0, ids, ranked * keep)


def check(logits, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    """Over a grid of uniforms, the token of the inverse, but for 1e-5 around its steps."""
    weights = exact_weights(logits, temperature, top_k, top_p, min_p)
    cumulated = weights.cumsum(0) / weights.sum()
    uniform = torch.cat((torch.tensor([0.0]), (torch.arange(GRID) + 0.37) / GRID))
    rows = logits.expand(len(uniform), -1)
    tokens = sample(rows, temperature, top_k, top_p, min_p, uniform).cpu()
    assert (weights[tokens] > 0).all()
    low = torch.where(tokens > 0, cumulated[(tokens - 1).clamp(min=0)], 0.0)
    assert (uniform >= low - 1e-5).all() and (uniform <= cumulated[tokens] + 1e-5).all()


CASES = [
    {},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 5000},
    {"top_p": 0.9},
    {"top_p": 1e-4},
    {"top_p": 0.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 41, "top_p": 0.83},
    {"top_k": 41, "top_p": 0.95, "min_p": 0.02, "temperature": 0.7},
    {"top_k": 3, "top_p": 0.999},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("vocab", [100, 9000] + ([128256] if ON_GPU else []))
def test_distribution(vocab, case):
    check(drawn(vocab), **case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_distribution_of_logits_with_many_ties(case):
    # As a 16-bit product gives them: a few dozen distinct values. Of equals, the first ids stay.
    check((drawn(5000) * 2).round() / 2, **case)
    check(torch.zeros(307), **case)


def test_greedy_takes_the_first_of_the_largest():
    logits = drawn(9000).repeat(3, 1)
    logits[1, [5000, 17, 8999]] = 50.0
    logits[2, 8999] = 50.0
    expected = logits.argmax(-1)
    assert expected[1] == 17
    assert torch.equal(sample(logits, 0.0).cpu(), expected)


def test_no_finite_largest_logit():
    logits = drawn(5000).repeat(5, 1)
    logits[0, 4321] = float("nan")
    logits[1, 7] = float("inf")
    logits[2] = float("-inf")
    logits[3, 1:] = float("-inf")
    for temperature in (0.0, 0.7):
        tokens = sample(logits, temperature, top_k=20, top_p=0.9).tolist()
        assert tokens[:4] == [-1, -1, -1, 0] and tokens[4] >= 0


def test_a_tiny_temperature_takes_the_largest():
    logits = drawn(3000).repeat(3, 1) * 100
    expected = logits.argmax(-1)
    for temperature in (1e-30, 1e-38, 1e-6):
        for limits in ({}, {"top_k": 5, "top_p": 0.9}):
            tokens = sample(logits, temperature, uniform=torch.tensor([0.0, 0.5, 0.999]), **limits)
            assert torch.equal(tokens.cpu(), expected)


def test_masked_tokens_are_never_drawn():
    logits = torch.full((4, 5000), float("-inf"))
    logits[:, [3, 4100, 4999]] = torch.tensor([0.0, 1.0, 0.5])
    uniform = torch.tensor([0.0, 0.2, 0.999, 1.0 - 2**-24])
    for limits in ({}, {"top_k": 1000}, {"top_p": 0.99}):
        tokens = sample(logits, uniform=uniform, **limits).tolist()
        assert tokens[0] == 3 and tokens[2] == 4999 and set(tokens) <= {3, 4100, 4999}


def test_a_number_next_to_1_draws_no_token_of_next_to_no_weight():
    """Sums in different orders differ in their last bits, which must not lead past the end."""
    logits = drawn(32768).repeat(8, 1)
    logits[:, -1] = -80.0
    uniform = 1.0 - torch.arange(1, 9) * 2.0**-24
    assert 32767 not in sample(logits, uniform=uniform).tolist()


def test_rows_have_their_own_parameters():
    logits = torch.stack([drawn(3000, seed) for seed in range(6)])
    temperature = torch.tensor([0.0, 1.0, 0.5, 1.0, 2.0, 0.7])
    top_k = torch.tensor([3000, 3000, 10, 1, 50, 3000])
    top_p = torch.tensor([1.0, 1.0, 0.9, 0.5, 1.0, 0.6])
    min_p = torch.tensor([0.0, 0.1, 0.0, 0.0, 0.0, 0.0])
    uniform = torch.tensor([0.5, 0.31, 0.72, 0.2, 0.9, 0.11])
    arguments = (temperature, top_k, top_p, min_p, uniform)
    expected = kernels.reference.sample(logits, *arguments)
    assert torch.equal(sample(logits, *arguments).cpu(), expected)
    wide = torch.cat((logits, logits), dim=1)[:, :3000]  # rows that lie apart
    assert torch.equal(sample(wide, *arguments).cpu(), expected)


def test_logits_that_are_not_float32_are_refused():
    with pytest.raises(ValueError, match="float16"):
        sample(drawn(8).half()[None])


def test_tokens_that_an_earlier_step_drew_are_put_in():
    ids = torch.tensor([5, -1, 0, -3, *range(200), -2], device=DEVICE)
    drawn = torch.tensor([11, -1, 13], device=DEVICE)  # the second row drew nothing
    expected = kernels.reference.resolve_tokens(ids, drawn)
    assert expected[[0, 1, 2, 3, -1]].tolist() == [5, 11, 0, 13, 0]
    assert torch.equal(sampling.resolve_tokens(ids, drawn), expected)
