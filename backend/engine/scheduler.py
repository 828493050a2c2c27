"""Which sequences work in the next step, and what becomes of their tokens.

Continuous batching (Orca, Yu et al. 2022) with chunked prefill (Sarathi, Agrawal et al. 2023):
every step first takes one token of each decoding sequence, then fills the rest of the token
budget with pieces of prompts. Owners of requests take turns to be admitted (`WaitingQueue`). When
blocks run out, the sequence admitted last gives its blocks back and waits at the head of the queue,
to be recomputed (mostly from the prefix cache); the oldest therefore always gets on, and nothing
starves. So does a sequence that outgrows the step of its rotary frequencies
(`backend.layers.rotary`), because they are others for all its tokens then.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from backend.engine.block_manager import BlockManager
from backend.engine.types import (
    Batch,
    EngineStats,
    FinishReason,
    SampledToken,
    ScheduledSequence,
    Sequence,
    StepOutput,
)
from backend.engine.waiting import WaitingQueue

# After a step that found no memory: tokens that a smaller one has at least, and steps that must
# succeed before larger ones are tried again.
SMALLEST_STEP = 16
STEPS_TO_GROWTH = 64


class Scheduler:
    """Queues of sequences over a `BlockManager`.

    Args:
        blocks: the KV pool's accounts.
        max_batch_size: sequences that run at the same time.
        max_step_tokens: tokens computed in one step, at least `max_batch_size`.
        rope_bounds: see `ModelInfo`.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_batch_size: int,
        max_step_tokens: int,
        rope_bounds: tuple[int, ...] = (),
    ) -> None:
        self.blocks = blocks
        self.max_batch_size = max_batch_size
        self.max_step_tokens = max(max_step_tokens, max_batch_size)
        self._rope_bounds = rope_bounds
        self._limits = (self.max_batch_size, self.max_step_tokens)
        self._steps_to_growth = STEPS_TO_GROWTH
        self.waiting = WaitingQueue()
        self.running: dict[str, Sequence] = {}  # in order of admission
        self.stats = EngineStats()

    def add(self, seq: Sequence) -> None:
        self.waiting.add(seq)

    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def abort(self, request_id: str) -> bool:
        """Forget a request and free its blocks at once; False if it is not here (any more)."""
        seq = self.running.pop(request_id, None)
        if seq is not None:
            seq.is_finished = True
            self.blocks.release(seq)
            return True
        seq = self.waiting.remove(request_id)
        if seq is not None:
            seq.is_finished = True
        return seq is not None

    def schedule(self) -> Batch:
        """The next step's work: decodes, then prompts begun, then new prompts.

        The steps launched before need not have been accounted for by `update`: their sequences go
        on as if no token that is still unknown ended a reply.
        """
        scheduled: list[ScheduledSequence] = []
        budget = self.max_step_tokens
        waiting = len(self.waiting)
        for seq in self._decoding():
            if seq.request_id not in self.running:
                continue  # put out for one before it
            if self._rope_step(seq) != seq.rope_step:
                self._put_out(seq)
            elif self._make_room(seq):
                scheduled.append(ScheduledSequence(seq, 1, True))
                budget -= 1
        for seq in self.running.values():
            if budget > 0 and seq.num_computed_tokens < seq.num_tokens - 1:
                scheduled.append(self._piece(seq, budget))
                budget -= scheduled[-1].num_tokens
        # Who was just put out must not come back in the same step.
        if budget > 0 and len(self.waiting) == waiting:
            for seq in self._admit():
                scheduled.append(self._piece(seq, budget))
                budget -= scheduled[-1].num_tokens
                if budget <= 0:
                    break
        return Batch(scheduled)

    def launched(self, batch: Batch) -> None:
        """Note that a batch is being computed, so that the next one can be scheduled."""
        if (self.max_batch_size, self.max_step_tokens) != self._limits:
            self._grow_back()
        row = 0
        for item in batch.scheduled:
            seq = item.sequence
            seq.num_computed_tokens += item.num_tokens
            if item.samples:
                seq.num_pending_tokens += 1
                seq.drawn_row = row
                row += 1

    def update(self, batch: Batch, sampled: list[SampledToken]) -> list[StepOutput]:
        """Account for a computed step; `sampled` in the order of the sequences that sample."""
        outputs = []
        tokens = iter(sampled)
        for item in batch.scheduled:
            seq = item.sequence
            drawn = next(tokens) if item.samples else None
            if seq.is_finished:
                continue  # while this step was on its way
            if drawn is not None:
                seq.num_pending_tokens -= 1
                outputs.append(self._take_token(seq, drawn))
            else:
                self.blocks.mark_computed(seq)
        stats = self.stats
        stats.num_steps += 1
        stats.num_output_tokens += len(outputs)
        return outputs

    def fail(self, seq: Sequence, error: str) -> StepOutput:
        """End a request that cannot go on, wherever it is."""
        self.abort(seq.request_id)
        return StepOutput(seq.request_id, [], "error", error=error)

    def shrink(self, batch: Batch) -> bool:
        """Make the steps from now on smaller than this one, which did not fit on the device.

        Fewer tokens a step first; then fewer sequences, of which the last admitted waits. False
        if the batch is one sequence with as few tokens as may be.
        """
        self._steps_to_growth = STEPS_TO_GROWTH
        if batch.num_tokens > max(len(batch.scheduled), SMALLEST_STEP):
            self.max_step_tokens = max(batch.num_tokens // 2, SMALLEST_STEP)
            return True
        if len(self.running) > 1:
            self.max_batch_size = (len(self.running) + 1) // 2
            while len(self.running) > self.max_batch_size:
                self.preempt(next(reversed(self.running.values())))
            return True
        return False

    def unshrink(self) -> None:
        """Back to the limits of the start."""
        self.max_batch_size, self.max_step_tokens = self._limits

    def _grow_back(self) -> None:
        """After some steps that did fit, allow twice as much: the shortage may be over."""
        self._steps_to_growth -= 1
        if not self._steps_to_growth:
            self._steps_to_growth = STEPS_TO_GROWTH
            self.max_batch_size = min(2 * self.max_batch_size, self._limits[0])
            self.max_step_tokens = min(2 * self.max_step_tokens, self._limits[1])

    def needs_replies(self) -> bool:
        """Whether some running sequence's next token depends on the host's knowing its last."""
        return any(seq.request.sampling.reads_reply for seq in self.running.values())

    def preempt(self, seq: Sequence) -> None:
        """Put a sequence out because blocks are needed elsewhere."""
        self._put_out(seq)
        self.stats.num_preemptions += 1

    def _put_out(self, seq: Sequence) -> None:
        """Take a running sequence's blocks; it waits at the head of the queue."""
        del self.running[seq.request_id]
        self.blocks.release(seq)
        self.waiting.put_back(seq)

    def gauges(self) -> EngineStats:
        """The counters, with the queues and the pool as they are now."""
        stats = self.stats
        stats.num_running = len(self.running)
        stats.num_waiting = len(self.waiting)
        stats.num_blocks_free = self.blocks.num_free
        stats.num_blocks_cached = self.blocks.num_cached
        return stats

    def _decoding(self) -> list[Sequence]:
        """Sequences that lack only their last token; a copy, because preemption changes queues.

        Not those whose last token is on its way already.
        """
        return [
            seq
            for seq in self.running.values()
            if seq.num_computed_tokens == seq.num_tokens - 1
            and seq.num_output_tokens + seq.num_pending_tokens < seq.max_tokens
        ]

    def _rope_step(self, seq: Sequence) -> int:
        """The step of the rotary frequencies that all its tokens, as many as now, must have."""
        return bisect_left(self._rope_bounds, seq.num_tokens)

    def _make_room(self, seq: Sequence) -> bool:
        """Room for one more token, if need be at the cost of the sequences admitted last."""
        while not self.blocks.grow(seq, seq.num_tokens):
            victim = next(reversed(self.running.values()))
            self.preempt(victim)
            if victim is seq:
                return False
        return True

    def _piece(self, seq: Sequence, budget: int) -> ScheduledSequence:
        missing = len(seq.token_ids) - seq.num_computed_tokens
        return ScheduledSequence(seq, min(missing, budget), missing <= budget)

    def _admit(self) -> Iterator[Sequence]:
        """Admit waiting sequences while they fit, leaving a block to each that runs already."""
        while self.waiting and len(self.running) < self.max_batch_size:
            seq = self.waiting.next(self.running.values())
            if seq.num_pending_tokens:  # preempted a moment ago; all its tokens must be known
                return
            if (step := self._rope_step(seq)) != seq.rope_step:
                seq.rope_step, seq.block_hashes = step, []
            if not self.blocks.attach(seq, reserve=len(self.running)):
                return
            self.waiting.take(seq)
            self.running[seq.request_id] = seq
            if not seq.was_admitted:
                seq.was_admitted = True
                seq.num_cached_tokens = seq.num_computed_tokens
                self.stats.num_cached_tokens += seq.num_cached_tokens
                self.stats.num_prompt_tokens += seq.num_prompt_tokens
            yield seq

    def _take_token(self, seq: Sequence, drawn: SampledToken) -> StepOutput:
        output = StepOutput(seq.request_id, [drawn.token_id])
        if drawn.logprob is not None:
            output.logprobs = [drawn.logprob]
        first = not seq.num_output_tokens
        if first:
            output.num_cached_tokens = seq.num_cached_tokens
        reason: FinishReason | None = None
        if drawn.token_id < 0:
            output.token_ids, output.logprobs, reason = [], None, "error"
            output.error = (
                "The model's output is not a number: its number format is too narrow for it (try "
                "--dtype bfloat16 or float32), or its weights are damaged."
            )
        else:
            seq.token_ids.append(drawn.token_id)
            self.blocks.mark_computed(seq)
            if drawn.token_id in seq.stop_ids and seq.num_output_tokens > (
                seq.request.sampling.min_tokens
            ):
                reason = "stop"
            elif seq.num_output_tokens >= seq.max_tokens:
                reason = "length"
        if reason is not None:
            output.finish_reason = reason
            self.abort(seq.request_id)
        return output
