"""The laws of the queue: owners take turns, nobody starves, each one's order is kept."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from backend.config import SamplingParams
from backend.engine.engine import Engine
from backend.engine.types import Request, Sequence
from backend.engine.waiting import WaitingQueue
from tests.fake_model import CheckingRunner, fake_info

OWNERS = ["", "anna", "bert", "cem", "dora"]


def sequence(number: int, owner: str) -> Sequence:
    request = Request(str(number), [1], SamplingParams(), owner=owner)
    return Sequence(request, [1], frozenset(), 1, random.Random(0))


class WaitingMachine(RuleBasedStateMachine):
    """Whoever waits while nothing of theirs runs is overtaken once by each of those who waited
    already, and not at all by who came later."""

    @initialize(places=st.integers(1, 6))
    def build(self, places: int) -> None:
        self.queue, self.places = WaitingQueue(), places
        self.running: list[Sequence] = []
        self.returned: list[Sequence] = []
        self.waiting: dict[str, list[Sequence]] = {}  # by owner, in their order
        self.overtaken: dict[str, list[str]] = {}  # owner without anything running -> by whom
        self.earlier: dict[str, set[str]] = {}  # who may overtake them
        self.count = 0

    @rule(owner=st.sampled_from(OWNERS), number=st.integers(1, 8))
    def add(self, owner: str, number: int) -> None:
        for _ in range(number):
            seq = sequence(self.count, owner)
            self.count += 1
            self.queue.add(seq)
            self.waiting.setdefault(owner, []).append(seq)
        self.note()

    @precondition(lambda self: len(self.queue) and len(self.running) < self.places)
    @rule()
    def admit(self) -> None:
        seq = self.queue.next(iter(self.running))
        assert self.queue.next(iter(self.running)) is seq
        self.queue.take(seq)
        self.running.append(seq)
        if self.returned:
            assert seq is self.returned.pop()
            self.note()
            return
        owner = seq.request.owner
        assert seq is self.waiting[owner].pop(0)
        if not self.waiting[owner]:
            del self.waiting[owner]
        self.note()
        for other, by in self.overtaken.items():
            by.append(owner)
            assert len(set(by)) == len(by), f"{owner} twice before {other}"
            assert owner in self.earlier[other], f"{owner}, who came later, before {other}"

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.running.remove(data.draw(st.sampled_from(self.running)))
        self.note()

    @precondition(lambda self: self.running)
    @rule()
    def preempt(self) -> None:
        seq = self.running.pop()
        self.queue.put_back(seq)
        self.returned.append(seq)
        self.note()

    @precondition(lambda self: len(self.queue))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.queue, key=lambda seq: seq.request_id)))
        assert self.queue.remove(seq.request_id) is seq
        assert self.queue.remove(seq.request_id) is None
        if seq in self.returned:
            self.returned.remove(seq)
        else:
            owner = seq.request.owner
            self.waiting[owner].remove(seq)
            if not self.waiting[owner]:
                del self.waiting[owner]
        self.note()

    def note(self) -> None:
        """Who waits with nothing running, since when."""
        busy = {seq.request.owner for seq in self.running}
        idle = set(self.waiting) - busy
        for owner in [owner for owner in self.overtaken if owner not in idle]:
            del self.overtaken[owner], self.earlier[owner]
        for owner in idle - set(self.overtaken):
            self.overtaken[owner] = []
            self.earlier[owner] = set(self.waiting) - {owner}

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "queue"):
            expected = [*self.returned, *(s for own in self.waiting.values() for s in own)]
            assert sorted(s.request_id for s in self.queue) == sorted(
                s.request_id for s in expected)
            assert len(self.queue) == len(expected) and bool(self.queue) == bool(expected)


WaitingMachine.TestCase.settings = settings(
    max_examples=300, stateful_step_count=50, deadline=None, derandomize=True)
TestWaiting = WaitingMachine.TestCase


def engine_of(places: int) -> Engine:
    info = fake_info(vocab_size=50, session_len=64, max_batch_size=places, num_blocks=400,
                     block_size=4)
    return Engine(CheckingRunner(info))


@pytest.mark.parametrize("places", [1, 2, 5])
def test_thirty_requests_of_one_delay_anothers_first_by_one_place(places: int) -> None:
    engine = engine_of(places)
    for number in range(30):
        sampling = SamplingParams(max_tokens=3 + number % 4)
        engine.add_request(Request(f"a{number}", [number], sampling, owner="anna"))
    for _ in range(4):
        engine.step()
    engine.add_request(Request("b", [40], SamplingParams(max_tokens=2), owner="bert"))
    ended: list[str] = []
    admitted = set(engine.scheduler.running)
    before_b: list[str] = []
    while "b" not in ended:
        for output in engine.step():
            if output.finish_reason:
                ended.append(output.request_id)
        for name in engine.scheduler.running:
            if name not in admitted:
                admitted.add(name)
                if "b" not in admitted:
                    before_b.append(name)
    assert len(before_b) <= 1


def test_a_class_is_served_in_turns() -> None:
    engine = engine_of(4)
    students = [f"student-{number}" for number in range(40)]
    for number in range(3):
        for student in students:
            engine.add_request(
                Request(f"{student}/{number}", [7], SamplingParams(max_tokens=2), owner=student))
    order: list[str] = []
    while engine.has_work():
        for output in engine.step():
            if output.finish_reason:
                order.append(output.request_id)
    for turn in range(3):
        served = order[40 * turn:40 * turn + 40]
        assert {name.split("/")[0] for name in served} == set(students)
        assert {name.split("/")[1] for name in served} == {str(turn)}


def test_one_owner_is_first_come_first_served() -> None:
    engine = engine_of(1)
    for number in range(9):
        engine.add_request(Request(str(number), [number], SamplingParams(max_tokens=1)))
    order = [o.request_id for _ in range(9) for o in engine.step()]
    assert order == [str(number) for number in range(9)]
