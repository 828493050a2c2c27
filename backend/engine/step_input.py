"""A batch as plain numbers, before any tensor: what every rank computes from."""

from __future__ import annotations

from collections.abc import Sequence as Items

from backend.engine.types import Batch, DrawParams, Sequence, StepInput


def prepare(batch: Batch, block_size: int) -> StepInput:
    """The batch as plain numbers."""
    step = StepInput([], [], [], [], [], [], [], [], [])
    for item in batch.scheduled:
        seq = item.sequence
        start = seq.num_computed_tokens
        end = start + item.num_tokens
        if seq.num_pending_tokens:
            step.token_ids.append(-1 - seq.drawn_row)
        else:
            step.token_ids += seq.token_ids[start:end]
        step.positions += range(start, end)
        step.slot_mapping += _slots(seq, start, end, block_size)
        step.query_lens.append(item.num_tokens)
        step.seq_lens.append(end)
        step.kv_runs.append(_runs(seq, end, block_size))
        step.block_tables.append(seq.block_table)
        step.rope_steps.append(seq.rope_step)
        if item.samples:
            step.sample_rows.append(len(step.token_ids) - 1)
    return step


def placeholder(lengths: list[int], samples: int, block_size: int) -> StepInput:
    """A step of new sequences of these lengths that stores nothing, to measure or warm up with.

    All their blocks are block 0. The first `samples` tokens draw, with all that drawing can ask.
    """
    tokens = sum(lengths)
    return StepInput(
        token_ids=[0] * tokens,
        positions=[position for length in lengths for position in range(length)],
        slot_mapping=[-1] * tokens,
        query_lens=lengths,
        seq_lens=lengths,
        kv_runs=[],
        block_tables=[[0] * -(-length // block_size) for length in lengths],
        sample_rows=list(range(samples)),
        rope_steps=[0] * len(lengths),
        draw=DrawParams(
            [1.0] * samples, [1] * samples, [0.5] * samples, [0.5] * samples, [0.5] * samples
        ),
    )


def _slots(seq: Sequence, start: int, end: int, block_size: int) -> Items[int]:
    """Pool slots of the positions start ... end - 1."""
    if len(seq.block_runs) == 1:
        base = seq.block_runs[0][0] * block_size
        return range(base + start, base + end)
    table = seq.block_table
    return [table[i // block_size] * block_size + i % block_size for i in range(start, end)]


def _runs(seq: Sequence, length: int, block_size: int) -> list[tuple[int, int]]:
    """The first `length` tokens of a sequence as (first slot, tokens) runs."""
    runs = []
    for first, count in seq.block_runs:
        tokens = min(count * block_size, length)
        runs.append((first * block_size, tokens))
        length -= tokens
        if not length:
            break
    return runs
