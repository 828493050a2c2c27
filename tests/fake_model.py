"""Models that need no weights, for the laws of everything around them."""

from __future__ import annotations

import time
from collections.abc import Callable

from backend.config import EngineConfig
from backend.engine.engine import Engine
from backend.engine.step_input import prepare
from backend.engine.types import Batch, ModelInfo, SampledToken, Sequence, TokenLogprob


def fake_info(
    *,
    vocab_size: int = 320,
    session_len: int = 512,
    max_batch_size: int = 16,
    num_blocks: int = 256,
    block_size: int = 8,
) -> ModelInfo:
    return ModelInfo(
        architecture="Fake",
        device="cpu",
        dtype="float32",
        vocab_size=vocab_size,
        session_len=session_len,
        max_batch_size=max_batch_size,
        num_blocks=num_blocks,
        block_size=block_size,
        weight_bytes=0,
        kv_bytes_per_token=1,
        tp=1,
    )


class FakeRunner:
    """Draws `next_token(sequence)`; with logprobs asked for, every token is certain.

    A step takes at least `step_s` seconds, as a real model's would.
    """

    def __init__(
        self, info: ModelInfo, next_token: Callable[[Sequence], int], step_s: float = 0.0
    ) -> None:
        self.info = info
        self._next_token = next_token
        self._step_s = step_s

    def execute(self, batch: Batch) -> list[SampledToken]:
        if self._step_s:
            time.sleep(self._step_s)
        sampled = []
        for item in batch.scheduled:
            if item.samples:
                token = self._next_token(item.sequence)
                wanted = item.sequence.request.sampling.logprobs
                logprob = None
                if wanted is not None:
                    top = [(token, 0.0), (0, -30.0)][:wanted]
                    logprob = TokenLogprob(token, 0.0, top)
                sampled.append(SampledToken(token, logprob))
        return sampled

    def close(self) -> None:
        """Nothing is held."""


def echo(eos_token_id: int, first_special_id: int = 256) -> Callable[[Sequence], int]:
    """Repeats the prompt's ordinary tokens, then ends."""

    def next_token(seq: Sequence) -> int:
        said = [t for t in seq.request.prompt_token_ids if t < first_special_id]
        index = seq.num_output_tokens
        return said[index] if index < len(said) else eos_token_id

    return next_token


def hashed(seq: Sequence, vocab_size: int) -> int:
    """A token that depends on all tokens before it, so that any mix-up shows."""
    return hash(tuple(seq.token_ids)) % vocab_size


class CheckingRunner(FakeRunner):
    """Simulates the KV pool: each slot holds the whole history that its KV would depend on.

    Every step reads all slots of its sequences back, as attention would, and insists that they
    hold these sequences' histories.
    """

    def __init__(self, info: ModelInfo) -> None:
        super().__init__(info, lambda seq: hashed(seq, info.vocab_size))
        self.pool: dict[int, int] = {}

    def execute(self, batch: Batch) -> list[SampledToken]:
        step = prepare(batch, self.info.block_size)
        written = list(step.slot_mapping)
        assert len(set(written)) == len(written), "two tokens written to one slot"
        at = 0
        for item in batch.scheduled:
            seq = item.sequence
            for offset in range(item.num_tokens):
                position = seq.num_computed_tokens + offset
                self.pool[written[at]] = hash(tuple(seq.token_ids[: position + 1]))
                at += 1
        for item, runs in zip(batch.scheduled, step.kv_runs):
            slots = [slot for first, count in runs for slot in range(first, first + count)]
            end = item.sequence.num_computed_tokens + item.num_tokens
            assert len(slots) == end
            for position, slot in enumerate(slots):
                history = tuple(item.sequence.token_ids[: position + 1])
                assert self.pool.get(slot) == hash(history), "a slot holds another's KV"
        return super().execute(batch)


def fake_engine(config: EngineConfig, eos_token_id: int = 257, step_s: float = 0.0) -> Engine:
    """An echoing engine as `config` sizes it; for the worker's `build` parameter."""
    info = fake_info(
        session_len=config.session_len or 2048,
        max_batch_size=config.max_batch_size,
        num_blocks=int(max(config.cache_max_entry_count, 1024)),
        block_size=config.cache_block_seq_len,
    )
    return Engine(
        FakeRunner(info, echo(eos_token_id), step_s),
        enable_prefix_caching=config.enable_prefix_caching,
        max_step_tokens=config.max_prefill_token_num,
    )
