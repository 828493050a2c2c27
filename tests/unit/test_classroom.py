"""Roles, pause, limits and figures of a class; signed passes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from backend.admission import Limits, RateLimitError
from backend.chat import Delta, ReplyStats
from backend.classroom import (
    MAX_NAME,
    MAX_PEOPLE,
    Caller,
    ClassPausedError,
    Classroom,
    HostOnlyError,
    Role,
    StudentLimits,
    clean_name,
)
from backend.config import SamplingParams
from backend.errors import OverloadedError, UserError
from backend.server.keys import Keys, Pass

HOST = Caller("h", "Ms Li", Role.HOST)
ANNA, BERT = Caller("a", "Anna", Role.STUDENT), Caller("b", "Bert", Role.STUDENT)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Backend:
    """Replies with `pieces`, a token each; a remote one tells their number at the end only."""

    def __init__(self, pieces: int, remote: bool = False) -> None:
        self.pieces, self.remote = pieces, remote
        self.asked: list[dict[str, Any]] = []
        self.go = asyncio.Event()

    async def stream(self, messages: Any, sampling: SamplingParams, **options: Any
                     ) -> AsyncGenerator[Delta, None]:
        self.asked.append({"sampling": sampling, **options})
        await self.go.wait()
        for i in range(self.pieces):
            yield Delta("x", num_tokens=0 if self.remote else i + 1)
        yield Delta("", "stop", stats=ReplyStats(3, self.pieces))


def test_room_in_a_callers_share() -> None:
    room = Classroom(has_hosts=True, limits=Limits(max_per_caller=3))
    with room.admit(ANNA, 3), room.admit(HOST, 2), room.admit(Caller(), 9):
        assert room.has_room(ANNA, 1) and not room.has_room(ANNA, 2)
        assert room.has_room(BERT, 4) and not room.has_room(BERT, 5)
        assert room.has_room(HOST, 1) and not room.has_room(HOST, 2)
        assert room.has_room(Caller(), 1000)


def test_without_hosts_everybody_is_one() -> None:
    keys = Keys(("first-key", "other-key"))
    found = keys.find("other-key")
    assert found is not None and keys.caller(found).role is Role.HOST
    assert keys.find_signed(keys.signed(keys.enter(found, "Anna"))) == found  # no names either
    assert Caller().role is Role.HOST


def test_only_hosts_act() -> None:
    room = Classroom(True)
    for act in (room.pause, room.resume, room.snapshot,
                lambda by: room.set_limits(by, StudentLimits())):
        with pytest.raises(HostOnlyError):
            act(ANNA)
        act(HOST)


def test_a_pause_lets_open_replies_go_on() -> None:
    room = Classroom(True)
    with room.admit(ANNA) as open_reply:
        room.pause(HOST)
        with pytest.raises(ClassPausedError, match="The host has paused the class"):
            room.admit(BERT)
        with room.admit(HOST):
            pass
        open_reply.started(0)
        open_reply.wrote(1)
    room.resume(HOST)
    with room.admit(BERT):
        pass


def test_limits_of_a_student() -> None:
    room = Classroom(True, Limits(max_waiting=10, max_per_caller=9))
    room.set_limits(HOST, StudentLimits(max_replies=2, max_tokens=100))
    with room.admit(ANNA), room.admit(ANNA):
        with pytest.raises(RateLimitError, match="You have 2 replies open; at most 2 may be"):
            room.admit(ANNA)
        with room.admit(BERT), room.admit(HOST, 7):
            with pytest.raises(RateLimitError):
                room.admit(HOST, 3)
            with pytest.raises(OverloadedError):
                room.admit(Caller("c", "", Role.STUDENT), 1)
    for asked, given in ((None, 100), (50, 50), (500, 100)):
        sampling = SamplingParams(max_tokens=asked)
        assert room.bounded(ANNA, sampling).max_tokens == given
        assert room.bounded(HOST, sampling) is sampling
    for wrong in (StudentLimits(0), StudentLimits(True), StudentLimits(4, 0),
                  StudentLimits("4")):  # type: ignore[arg-type]
        with pytest.raises(UserError):
            room.set_limits(HOST, wrong)
    assert room.student_limits == StudentLimits(2, 100)


@pytest.mark.parametrize("remote", [False, True])
def test_what_the_host_sees(remote: bool) -> None:
    async def test() -> None:
        clock = Clock()
        room = Classroom(True, clock=clock)
        room.set_limits(HOST, StudentLimits(max_tokens=64))
        room.see(HOST)
        backend = Backend(10, remote)
        deltas = room.reply(ANNA, backend, [], SamplingParams(), model="m")  # type: ignore[arg-type]
        reading = asyncio.create_task(anext(deltas))
        while not backend.asked:
            await asyncio.sleep(0)
        asked = backend.asked[0]
        assert (asked["sampling"].max_tokens, asked["owner"], asked["model"]) == (64, "a", "m")
        status = room.snapshot(HOST)
        assert [row.name for row in status.people] == ["Ms Li", "Anna"]
        assert (status.people[1].waiting, status.people[1].running) == (1, 0)
        assert (status.waiting, status.running, status.tokens) == (1, 0, 0)
        backend.go.set()
        await reading
        assert (room.snapshot(HOST).waiting, room.snapshot(HOST).running) == (0, 1)
        async for _ in deltas:
            pass
        clock.now += 1
        status = room.snapshot(HOST)
        assert status.people[1].tokens == status.tokens == 10 and status.people[1].replies == 1
        assert 1.5 < status.tokens_per_s == status.people[1].tokens_per_s < 2
        assert status.people[1].seen_s == 1 and status.running == 0
        clock.now += 60
        assert room.snapshot(HOST).tokens_per_s < 0.01
    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_reply_that_is_given_up_leaves_nothing_behind() -> None:
    async def test() -> None:
        room = Classroom(True)
        deltas = room.reply(ANNA, Backend(3), [], SamplingParams())  # type: ignore[arg-type]
        reading = asyncio.create_task(anext(deltas))
        while not room.admission.total.open:
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert room.admission.total.open == room.admission.total.waiting == 0
    asyncio.run(asyncio.wait_for(test(), 60))


def test_people_are_forgotten_but_not_their_open_replies() -> None:
    clock = Clock()
    room = Classroom(True, clock=clock)
    with room.admit(ANNA):
        for number in range(MAX_PEOPLE + 20):
            clock.now += 1
            room.see(Caller(str(number), "", Role.STUDENT))
        people = room.snapshot(HOST).people
        assert len(people) == MAX_PEOPLE and people[0].id == ANNA.id
        assert people[-1].id == str(MAX_PEOPLE + 19)


@pytest.mark.parametrize(("given", "name"), [
    ("Anna", "Anna"), ("  Anna \t Li\n", "Anna Li"), ("李小明", "李小明"), ("x" * 40, "x" * 40),
    ("e\u0301", "é"), ("<b>", "<b>"),
])
def test_names(given: str, name: str) -> None:
    assert clean_name(given) == name


@pytest.mark.parametrize("given", ["", "  ", "\u200b", "x" * (MAX_NAME + 1), "a\x00b", "a\x1b[1m",
                                   "a\u202eb", "\ufffd", "x" * 1_000_000, "a\ud800"])
def test_no_names(given: str) -> None:
    with pytest.raises(UserError) as refused:
        clean_name(given)
    assert refused.value.field == "name"


def test_passes_survive_a_restart_and_cannot_be_forged() -> None:
    def keys(hosts: tuple[str, ...] = ("host-key-1",)) -> Keys:
        return Keys(("class-key-1",), hosts)

    entered = keys().enter(Pass(0), "Anna")
    signed = keys().signed(entered)
    assert keys().find_signed(signed) == keys().find(signed) == entered
    caller = keys().caller(entered)
    assert (caller.name, caller.role) == ("Anna", Role.STUDENT)
    name, person, signature = signed.split(".")
    host = keys().signed(keys().enter(Pass(1), "Ms Li"))
    assert keys().caller(Pass(1)).role is Role.HOST
    for forged in (
        f"{name}.{person}.{signature[1:]}0", f"{name}.{person}.{signature[::-1]}",
        f"{host.split('.')[0]}.{person}.{signature}",  # another's name
        f"{name}.{host.split('.')[1]}.{signature}",  # another's place
        f"{name}.{person}.{host.split('.')[2]}",
        f"{name}.{person}", f"{name}..{signature}", f".{person}.{signature}", "", "..",
        f"{signed}\n", f" {signed}", signed.upper(), f"é.{person}.{signature}",
        # What a student can make of the key that he knows.
        Keys(("class-key-1",)).signed(Pass(0, "Ms Li", person)),
        Keys(("class-key-1",), ("class-key-1",)).signed(Pass(1, "Ms Li", person)),
        Keys(("class-key-1",)).signed(Pass(0)),
    ):
        assert keys().find(forged) is None and keys().find_signed(forged) is None, forged
    assert keys(("host-key-2",)).find_signed(signed) is None
    assert Keys(("class-key-1",)).find_signed(signed) is None  # no class any more


def test_same_name_other_person_and_other_name_same_person() -> None:
    keys = Keys(("class-key-1",), ("host-key-1",))
    first, second = keys.enter(Pass(0), "Anna"), keys.enter(Pass(0), "Anna")
    assert keys.caller(first).id != keys.caller(second).id
    renamed = keys.enter(Pass(0), "Annika", first)
    assert keys.caller(renamed).id == keys.caller(first).id
    assert keys.caller(renamed).name == "Annika"
    # Who becomes a host is somebody else: his students' limits end, and nobody inherits his pass.
    assert keys.enter(Pass(1), "Anna", first).person != first.person
    guest = keys.enter(Pass(0))
    assert guest.name == f"guest-{guest.person[:4]}"
    again = keys.find(keys.signed(first))
    assert again is not None and keys.caller(keys.enter(again)) == keys.caller(first)
