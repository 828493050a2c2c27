"""The laws of scheduler and block manager: a state machine adds, steps, aborts and preempts."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from backend.config import SamplingParams
from backend.engine.engine import Engine
from backend.engine.types import Request, Sequence, StepOutOfMemoryError, StepOutput
from tests.fake_model import CheckingRunner, fake_info

VOCAB = 50


def expected_reply(prompt: list[int], max_tokens: int, stop: frozenset[int]) -> list[int]:
    """What the hashing model says to a prompt when alone."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(hash(tuple(tokens)) % VOCAB)
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(9, 24),
        block_size=st.sampled_from([2, 4]),
        max_batch_size=st.integers(1, 5),
        max_step_tokens=st.integers(1, 24),
        prefix=st.booleans(),
        max_ahead=st.integers(0, 1),
        penalties=st.booleans(),
        steps=st.lists(st.integers(2, 8), max_size=5),
    )
    def build(
        self, num_blocks, block_size, max_batch_size, max_step_tokens, prefix, max_ahead, penalties,
        steps,
    ):
        session_len = min(num_blocks * block_size, 30)
        info = fake_info(
            vocab_size=VOCAB,
            session_len=session_len,
            max_batch_size=max_batch_size,
            num_blocks=num_blocks,
            block_size=block_size,
            rope_bounds=(*accumulate(steps), 64) if steps else (),
        )
        self.engine = Engine(
            CheckingRunner(info, max_ahead),
            enable_prefix_caching=prefix,
            max_step_tokens=max_step_tokens,
            random_source=random.Random(0),
        )
        self.penalties = penalties
        self.session_len = session_len
        self.replies: dict[str, list[int]] = {}
        self.expected: dict[str, list[int]] = {}
        self.finished: dict[str, str] = {}
        self.aborted: set[str] = set()
        self.count = 0

    @rule(
        shared=st.integers(0, 12),
        own=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=10),
        max_tokens=st.integers(1, 14),
        stop=st.frozensets(st.integers(0, VOCAB - 1), max_size=3),
        salt=st.sampled_from(["", "a"]),
    )
    def add(self, shared, own, max_tokens, stop, salt):
        prompt = (([7, 3] * 6)[:shared] + own)[: self.session_len - 1]
        request_id = str(self.count)
        self.count += 1
        # Some requests want their replies known before they go on.
        penalty = 0.5 if self.penalties and self.count % 3 == 0 else 0.0
        sampling = SamplingParams(
            max_tokens=max_tokens, stop_token_ids=tuple(stop), presence_penalty=penalty
        )
        self.engine.add_request(Request(request_id, prompt, sampling, owner=salt))
        self.replies[request_id] = []
        limit = min(max_tokens, self.session_len - len(prompt))
        self.expected[request_id] = expected_reply(prompt, limit, stop)

    @rule()
    def step(self):
        had_work = self.engine.has_work()
        before = self.progress()
        outputs = self.engine.step()
        for output in outputs:
            self.record(output)
        if had_work:
            assert outputs or self.progress() != before, "a step with work to do did nothing"

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def abort(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.live())))
        self.engine.abort_request(request_id)
        self.aborted.add(request_id)

    @precondition(lambda self: self.engine.scheduler.running)
    @rule(data=st.data())
    def preempt(self, data):
        running = self.engine.scheduler.running
        self.engine.scheduler.preempt(running[data.draw(st.sampled_from(sorted(running)))])

    def live(self) -> set[str]:
        return set(self.replies) - set(self.finished) - self.aborted

    def progress(self) -> list[tuple[str, int]]:
        running = self.engine.scheduler.running.values()
        steps = ("steps", self.engine.stats().num_steps)
        return [steps, *((seq.request_id, seq.num_computed_tokens) for seq in running)]

    def record(self, output: StepOutput) -> None:
        assert output.request_id in self.live(), "a word after the end"
        self.replies[output.request_id] += output.token_ids
        if output.finish_reason is not None:
            self.finished[output.request_id] = output.finish_reason
            assert self.replies[output.request_id] == self.expected[output.request_id]

    @invariant()
    def accounts_balance(self):
        if not hasattr(self, "engine"):
            return
        blocks, scheduler = self.engine.scheduler.blocks, self.engine.scheduler
        owners: dict[int, int] = {}
        for seq in scheduler.running.values():
            assert len(set(seq.block_table)) == len(seq.block_table)
            runs = [first + i for first, count in seq.block_runs for i in range(count)]
            assert runs == seq.block_table
            for block in seq.block_table:
                owners[block] = owners.get(block, 0) + 1
            for block in seq.block_table[seq.num_hashed_blocks :]:
                assert blocks._ref_count[block] == 1, "a block that is written has two owners"
        assert all(not seq.block_table for seq in scheduler.waiting)
        assert [owners.get(b, 0) for b in range(blocks.num_blocks)] == blocks._ref_count
        assert blocks.num_free + blocks.num_cached + len(owners) == blocks.num_blocks
        assert blocks._taken.count(0) == blocks.num_free
        assert not set(blocks._cached) & set(owners)
        assert len(scheduler.running) <= scheduler.max_batch_size

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        for _ in range(40 * (len(self.live()) + 1)):  # bounded: nothing may starve
            for output in self.engine.step():
                self.record(output)
            self.accounts_balance()
        assert not self.live() and not self.engine.has_work()
        blocks = self.engine.scheduler.blocks
        assert blocks.num_free + blocks.num_cached == blocks.num_blocks, "a block was lost"


SchedulerMachine.TestCase.settings = settings(
    max_examples=400, stateful_step_count=40, deadline=None, derandomize=True
)
TestScheduler = SchedulerMachine.TestCase


def engine_of(num_blocks: int, **options) -> Engine:
    info = fake_info(
        vocab_size=VOCAB,
        session_len=64,
        num_blocks=num_blocks,
        block_size=4,
        rope_bounds=options.pop("rope_bounds", ()),
        max_batch_size=options.pop("max_batch_size", 4),
    )
    return Engine(CheckingRunner(info, options.pop("max_ahead", 0)), **options)


def drain(engine: Engine) -> dict[str, list[int]]:
    replies: dict[str, list[int]] = {}
    while engine.has_work():
        for output in engine.step():
            replies.setdefault(output.request_id, []).extend(output.token_ids)
    return replies


def test_a_second_turn_reuses_the_first():
    engine = engine_of(32)
    engine.add_request(Request("a", list(range(20)), SamplingParams(max_tokens=9)))
    reply = drain(engine)["a"]
    turn = list(range(20)) + reply + [1, 2, 3]
    engine.add_request(Request("b", turn, SamplingParams(max_tokens=1)))
    output = engine.step()[0]
    assert (
        output.num_cached_tokens == 28
    )  # 20 + 9 tokens, of which the last has no KV yet: 7 blocks


def test_a_prefix_is_shared_within_a_step_of_the_rotary_frequencies_only():
    engine = engine_of(64, rope_bounds=(24, 36, 64))
    for length, cached in ((20, 0), (23, 20), (30, 0), (36, 28), (37, 0), (24, 20)):
        engine.add_request(Request("a", list(range(length)), SamplingParams(max_tokens=1)))
        assert engine.step()[0].num_cached_tokens == cached


@pytest.mark.parametrize("max_ahead", [0, 1])
def test_a_sequence_that_outgrows_its_step_is_computed_anew(max_ahead):
    engine = engine_of(64, rope_bounds=(24, 36, 64), max_ahead=max_ahead)
    for name, length in (("a", 20), ("b", 3), ("c", 40)):
        engine.add_request(Request(name, [ord(name) % VOCAB] * length, SamplingParams()))
    replies = drain(engine)
    for name, length in (("a", 20), ("b", 3), ("c", 40)):
        prompt = [ord(name) % VOCAB] * length
        assert replies[name] == expected_reply(prompt, 64 - length, frozenset())
    assert not engine.stats().num_preemptions  # blocks were not scarce
    # A second turn finds what the reply has left behind, in its last step.
    prompt = [ord("a") % VOCAB] * 20
    engine.add_request(Request("d", prompt + replies["a"][:30], SamplingParams(max_tokens=1)))
    assert [o.num_cached_tokens for _ in range(3) for o in engine.step()] == [48]


def test_other_salts_share_nothing():
    engine = engine_of(32)
    for salt in ("a", "b"):
        engine.add_request(Request(salt, list(range(20)), SamplingParams(max_tokens=1), [], salt))
        assert engine.step()[0].num_cached_tokens == 0


def test_a_reply_stays_in_one_run_of_blocks_beside_others():
    engine = engine_of(256)
    seqs: list[Sequence] = []
    for name in "abcd":
        engine.add_request(Request(name, [ord(name) % VOCAB] * 5, SamplingParams(max_tokens=40)))
    for _ in range(30):
        engine.step()
        seqs = list(engine.scheduler.running.values())
    assert [len(seq.block_runs) for seq in seqs] == [1, 1, 1, 1]


def test_preempted_alone_equals_unpreempted():
    plain, disturbed = engine_of(8), engine_of(8)
    for engine in (plain, disturbed):
        for name in "abc":
            engine.add_request(
                Request(name, [ord(name) % VOCAB] * 6, SamplingParams(max_tokens=20))
            )
    replies: dict[str, list[int]] = {}
    while disturbed.has_work():
        for output in disturbed.step():
            replies.setdefault(output.request_id, []).extend(output.token_ids)
        if disturbed.scheduler.running and disturbed.scheduler.stats.num_steps % 3 == 0:
            disturbed.scheduler.preempt(next(iter(disturbed.scheduler.running.values())))
    assert replies == drain(plain)
    assert disturbed.scheduler.stats.num_preemptions > 3


@pytest.mark.parametrize("prompt", [[], list(range(64)), [VOCAB], [-1]])
def test_what_can_never_run_is_refused(prompt):
    engine = engine_of(32)
    with pytest.raises(ValueError):
        engine.add_request(Request("a", prompt, SamplingParams()))
    assert not engine.has_work()


def test_a_reply_ends_where_the_context_does():
    engine = engine_of(32)
    engine.add_request(Request("a", [1] * 60, SamplingParams()))
    assert len(drain(engine)["a"]) == 4


def test_min_tokens_count_before_the_stop():
    # The fake ignores banned stops, so one that comes too early must simply not end the reply.
    engine = engine_of(32)
    sampling = SamplingParams(min_tokens=5, max_tokens=8, stop_token_ids=tuple(range(VOCAB)))
    engine.add_request(Request("a", [1], sampling))
    assert len(drain(engine)["a"]) == 6


def test_a_prompt_preempted_before_its_end_is_counted_once():
    engine = engine_of(32, max_step_tokens=4, max_batch_size=1)
    engine.add_request(Request("a", list(range(20)), SamplingParams(max_tokens=2)))
    engine.step()
    engine.scheduler.preempt(engine.scheduler.running["a"])
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    assert engine.stats().num_prompt_tokens == 20
    assert outputs[0].num_cached_tokens == 0  # its own blocks are no one's prefix


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_a_step_ahead_gives_the_same_replies(penalty):
    """Prompts in pieces, stops that come while the next step is under way, too few blocks."""
    replies = []
    for max_ahead in (0, 1):
        engine = engine_of(12, max_ahead=max_ahead, max_step_tokens=8)
        for i, name in enumerate("abcdef"):
            sampling = SamplingParams(
                max_tokens=9 + i, stop_token_ids=(3, 17), presence_penalty=penalty * (i == 2)
            )
            engine.add_request(Request(name, [ord(name) % VOCAB] * (5 + i), sampling))
        replies.append(drain(engine))
        assert engine.stats().num_blocks_free + engine.stats().num_blocks_cached == 12
    assert replies[0] == replies[1]


def test_limits_grow_back_after_a_shortage():
    engine = engine_of(64, max_batch_size=8, max_step_tokens=64)
    for name in "abcd":
        engine.add_request(Request(name, [ord(name) % VOCAB] * 3, SamplingParams(max_tokens=40)))
    engine.step()
    scheduler = engine.scheduler
    batch = scheduler.schedule()
    assert scheduler.shrink(batch) and scheduler.max_batch_size == 2
    assert scheduler.stats.num_preemptions == 2
    drain(engine)
    assert scheduler.max_batch_size > 2


class CrampedRunner(CheckingRunner):
    """Has room for so many tokens a step, and for a sequence of so many tokens."""

    def __init__(self, info, max_ahead, step_tokens, seq_tokens):
        super().__init__(info, max_ahead)
        self.room = (step_tokens, seq_tokens)

    def launch(self, batch):
        longest = max(item.sequence.num_tokens for item in batch.scheduled)
        if batch.num_tokens > self.room[0] or longest > self.room[1]:
            raise StepOutOfMemoryError("No room.")
        return super().launch(batch)


@pytest.mark.parametrize("max_ahead", [0, 1])
def test_too_little_memory_fails_the_request_that_needs_it_and_no_other(max_ahead):
    info = fake_info(
        vocab_size=VOCAB, session_len=64, num_blocks=64, block_size=4, max_batch_size=4
    )
    engine = Engine(CrampedRunner(info, max_ahead, 20, 40), max_step_tokens=64)
    for name, length in (("a", 20), ("b", 45), ("c", 12), ("d", 38)):
        prompt = [ord(name) % VOCAB] * length
        engine.add_request(Request(name, prompt, SamplingParams(max_tokens=6)))
    ends, replies = {}, {}
    while engine.has_work():
        for output in engine.step():
            replies.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason:
                assert output.request_id not in ends
                ends[output.request_id] = output.finish_reason
    assert ends == {"a": "length", "b": "error", "c": "length", "d": "error"}
    assert replies["a"] == expected_reply([ord("a") % VOCAB] * 20, 6, frozenset())
    assert replies["d"] == expected_reply([ord("d") % VOCAB] * 38, 6, frozenset())[:3]
    stats = engine.stats()
    assert stats.num_blocks_free + stats.num_blocks_cached == 64
