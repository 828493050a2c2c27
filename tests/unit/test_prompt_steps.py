"""Numbers of tokens that steps with prompts are padded to."""

from __future__ import annotations

from hypothesis import given, strategies as st

from backend.engine.prompt_steps import MOST_TOKENS, token_counts


@given(st.integers(1, 5000))
def test_every_step_up_to_the_largest_has_a_number(most):
    counts = token_counts(most)
    assert counts == sorted(set(counts)) and counts[-1] == min(most, MOST_TOKENS)


def test_no_step_is_padded_by_much():
    counts = token_counts(MOST_TOKENS)
    for smaller, larger in zip(counts, counts[1:]):
        assert larger - smaller <= max(32, (larger + 2) // 3)
