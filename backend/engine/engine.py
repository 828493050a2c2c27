"""The engine: requests in, tokens out, one step at a time. `step` is the whole diagram."""

from __future__ import annotations

import random
from typing import Protocol

from backend.engine.block_manager import BlockManager
from backend.engine.scheduler import Scheduler
from backend.engine.types import (
    Batch,
    EngineStats,
    ModelInfo,
    Request,
    SampledToken,
    Sequence,
    StepOutput,
)


class Runner(Protocol):
    """What the engine needs of a model: `ModelRunner`, or a fake in tests."""

    info: ModelInfo

    def execute(self, batch: Batch) -> list[SampledToken]:
        """Compute the batch's tokens and draw one for each scheduled sequence that samples."""

    def close(self) -> None:
        """Give back what is not this object's own memory, as further ranks."""


class Engine:
    """Continuous batching over a model runner. Not thread-safe: one caller.

    Args:
        runner: the model; a parameter, so that tests bring their own.
        enable_prefix_caching: see `EngineConfig`.
        max_step_tokens: `EngineConfig.max_prefill_token_num`.
        random_source: seeds the requests that bring no seed.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        enable_prefix_caching: bool = True,
        max_step_tokens: int = 2048,
        random_source: random.Random | None = None,
    ) -> None:
        self.runner = runner
        info = runner.info
        blocks = BlockManager(info.num_blocks, info.block_size, enable_prefix_caching)
        self.scheduler = Scheduler(blocks, info.max_batch_size, max_step_tokens)
        self._random = random_source or random.Random()

    def add_request(self, request: Request) -> None:
        """Queue a request. Its tokens and limits were checked by whoever made it.

        Raises:
            ValueError: it can never run (empty, too long, ids outside the vocabulary).
        """
        sampling, info = request.sampling, self.runner.info
        prompt = request.prompt_token_ids
        room = info.session_len - len(prompt)
        if not prompt or room < 1:
            raise ValueError(f"A prompt of {len(prompt)} tokens cannot run.")
        named = (*prompt, *sampling.stop_token_ids, *request.eos_token_ids, *sampling.logit_bias)
        if min(named) < 0 or max(named) >= info.vocab_size:
            raise ValueError(f"A token id is outside the vocabulary of {info.vocab_size}.")
        eos = () if sampling.ignore_eos else request.eos_token_ids
        seed = sampling.seed if sampling.seed is not None else self._random.getrandbits(64)
        self.scheduler.add(
            Sequence(
                request=request,
                token_ids=list(prompt),
                stop_ids=frozenset((*sampling.stop_token_ids, *eos)),
                max_tokens=min(sampling.max_tokens or room, room),
                # random.Random takes a number and its negative for the same.
                random=random.Random(seed % (1 << 64)),
            )
        )

    def abort_request(self, request_id: str) -> None:
        """Forget a request at once, wherever it is. Unknown ids (just finished) are no error."""
        self.scheduler.abort(request_id)

    def has_work(self) -> bool:
        return self.scheduler.has_work()

    def stats(self) -> EngineStats:
        return self.scheduler.gauges()

    def step(self) -> list[StepOutput]:
        """Compute one batch; returns what it brought: nothing for prompts still partial."""
        batch = self.scheduler.schedule()
        sampled = self.runner.execute(batch) if batch.scheduled else []
        return self.scheduler.update(batch, sampled)
