"""Models that need no weights, for the laws of everything around them."""

from __future__ import annotations

import time
from bisect import bisect_left
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
    rope_bounds: tuple[int, ...] = (),
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
        kv_bits=32,
        quantization="",
        weight_bytes=0,
        kv_bytes_per_token=1,
        tp=1,
        rope_bounds=rope_bounds,
    )


class FakeRunner:
    """Draws `next_token(sequence)`; with logprobs asked for, every token is certain.

    A step takes at least `step_s` seconds, as a real model's would.
    """

    max_ahead = 0

    def __init__(
        self, info: ModelInfo, next_token: Callable[[Sequence], int], step_s: float = 0.0
    ) -> None:
        self.info = info
        self._next_token = next_token
        self._step_s = step_s

    def launch(self, batch: Batch) -> list[SampledToken]:
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

    def collect(self, launched: list[SampledToken]) -> list[SampledToken]:
        return launched

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
    """Simulates the KV pool: each slot holds the whole history that its KV would depend on, and the
    step of its rotary frequencies, which must be that of the sequence's length.

    Every step reads all slots of its sequences back, as attention would, and insists that they
    hold these sequences' histories.

    Args:
        max_ahead: 1 plays a device that computes beside the host: tokens stay with it until they
            are collected, and the next step reads them by their rows.
    """

    def __init__(self, info: ModelInfo, max_ahead: int = 0) -> None:
        super().__init__(info, lambda seq: hashed(seq, info.vocab_size))
        self.max_ahead = max_ahead
        self.pool: dict[int, int] = {}
        self._last_drawn: list[int] = []
        self._unknown: dict[str, list[int]] = {}  # request -> tokens that the host lacks

    def launch(self, batch: Batch) -> list[tuple[str, SampledToken]]:
        step = prepare(batch, self.info.block_size)
        written = list(step.slot_mapping)
        assert len(set(written)) == len(written), "two tokens written to one slot"
        at, drawn = 0, []
        for item, runs, rope_step in zip(batch.scheduled, step.kv_runs, step.rope_steps):
            seq = item.sequence
            unknown = self._unknown.setdefault(seq.request_id, [])
            assert len(unknown) == seq.num_pending_tokens
            tokens = [*seq.token_ids, *unknown]
            assert rope_step == bisect_left(self.info.rope_bounds, len(tokens)), "not its step"
            for offset in range(item.num_tokens):
                position = seq.num_computed_tokens + offset
                given = step.token_ids[at]
                token = given if given >= 0 else self._last_drawn[-1 - given]
                assert token == tokens[position]
                self.pool[written[at]] = hash((rope_step, *tokens[: position + 1]))
                at += 1
            end = seq.num_computed_tokens + item.num_tokens
            slots = [slot for first, count in runs for slot in range(first, first + count)]
            assert len(slots) == end
            for position, slot in enumerate(slots):
                history = (rope_step, *tokens[: position + 1])
                assert self.pool.get(slot) == hash(history), "a slot holds another's KV"
            if item.samples:
                assert end == len(tokens)
                token = hash(tuple(tokens)) % self.info.vocab_size
                unknown.append(token)
                drawn.append((seq.request_id, SampledToken(token)))
        self._last_drawn = [token.token_id for _, token in drawn]
        return drawn

    def collect(self, launched: list[tuple[str, SampledToken]]) -> list[SampledToken]:
        for request_id, token in launched:
            assert self._unknown[request_id].pop(0) == token.token_id
        return [token for _, token in launched]


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
