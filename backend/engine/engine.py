"""The engine: requests in, tokens out, one step at a time. `step` is the whole diagram."""

from __future__ import annotations

import logging
import random
from collections import deque
from typing import Any, Protocol

from backend.engine.block_manager import BlockManager
from backend.engine.scheduler import Scheduler
from backend.engine.types import (
    Batch,
    EngineStats,
    ModelInfo,
    Request,
    SampledToken,
    Sequence,
    StepOutOfMemoryError,
    StepOutput,
)

log = logging.getLogger(__name__)


class Runner(Protocol):
    """What the engine needs of a model: `ModelRunner`, or a fake in tests."""

    info: ModelInfo
    # Steps that may be under way while the next is scheduled: 1 where a device computes beside
    # the host, else 0.
    max_ahead: int

    def launch(self, batch: Batch) -> Any:
        """Start computing the batch, and drawing a token for each sequence that samples.

        Raises:
            StepOutOfMemoryError: the device has no room for it; nothing was started.
        """

    def collect(self, launched: Any) -> list[SampledToken]:
        """Wait for what `launch` returned; its tokens, in the order of those that sample."""

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
        self.scheduler = Scheduler(
            blocks, info.max_batch_size, max_step_tokens, info.rope_bounds
        )
        self._random = random_source or random.Random()
        self._under_way: deque[tuple[Batch, Any]] = deque()  # launched, not accounted for

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
        return self.scheduler.has_work() or bool(self._under_way)

    def stats(self) -> EngineStats:
        return self.scheduler.gauges()

    def step(self) -> list[StepOutput]:
        """Launch one batch, and account for the oldest that was launched; returns what it brought.

        A device computes one batch while the host schedules the next, unless a sequence's next
        token depends on its last in ways that only the host can work out.
        """
        batch = self.scheduler.schedule()
        if batch.scheduled:
            try:
                launched = self.runner.launch(batch)
            except StepOutOfMemoryError as error:
                return self._make_do(batch, str(error))
            self.scheduler.launched(batch)
            self._under_way.append((batch, launched))
        runs_ahead = bool(batch.scheduled) and not self.scheduler.needs_replies()
        return self._account(down_to=self.runner.max_ahead if runs_ahead else 0)

    def _account(self, down_to: int) -> list[StepOutput]:
        """Wait for the oldest steps, until so many are under way."""
        outputs = []
        while len(self._under_way) > down_to:
            batch, launched = self._under_way.popleft()
            outputs += self.scheduler.update(batch, self.runner.collect(launched))
        return outputs

    def _make_do(self, batch: Batch, reason: str) -> list[StepOutput]:
        """A batch for which the device has no room: smaller steps from now on.

        The request that finds no room even alone fails; the limits are then back, because it was
        the one that did not fit.
        """
        outputs = self._account(down_to=0)
        scheduled = [item.sequence for item in batch.scheduled if not item.sequence.is_finished]
        if scheduled and not self.scheduler.shrink(batch):
            outputs.append(self.scheduler.fail(scheduled[0], reason))
            self.scheduler.unshrink()
        scheduler = self.scheduler
        log.warning(
            "%s From now on at most %d tokens a step, of at most %d sequences.",
            reason, scheduler.max_step_tokens, scheduler.max_batch_size,
        )  # fmt: skip
        return outputs
