"""Who is here, and what they may: host and students, over one model that all of them share.

Page and API have one `Classroom`: the same name, limits and place in the queue wherever somebody
asks. Without host keys there is no class: everybody who comes in is a host.
"""

from __future__ import annotations

import time
import unicodedata
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from backend.admission import Account, Admission, Limits, Ticket
from backend.chat import ChatBackend, Delta, Message
from backend.config import SamplingParams, option, validate
from backend.errors import UserError

SCOPE_KEY = "lmdesk.caller"  # where the guard leaves the caller in a request's scope
MAX_NAME = 40  # characters
MAX_PEOPLE = 500  # remembered; those seen last
MOST_REPLIES, MOST_TOKENS = 256, 1_000_000  # that a student's limits may be


class Role(StrEnum):
    """What somebody may do."""

    HOST = "host"  # everything
    STUDENT = "student"  # chat and compare what is served, on the page and by the API


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request.

    Attributes:
        id: the same for the same person on page and API, and nobody can guess another's; "" where
            there are no keys.
        name: as given at the login; not proven. "" for a program with the class's key.
    """

    id: str = ""
    name: str = ""
    role: Role = Role.HOST


class HostOnlyError(UserError):
    """A student asked for what only a host may."""

    status = 403
    code = "host_only"

    def __init__(self) -> None:
        super().__init__("Only the host of this class may do that.",
                         "Log in with a host key, or ask the host.")


class ClassPausedError(UserError):
    """The host has paused the class; replies that are being written go on."""

    status = 503
    code = "class_paused"

    def __init__(self) -> None:
        super().__init__("The host has paused the class.", "Send it again when it goes on.")


@dataclass(frozen=True, slots=True)
class StudentLimits:
    """What one student may have; the host changes it while the class goes on."""

    max_replies: int = option(
        4, "replies that a student may have open at a time, waiting or being written",
        low=1, high=MOST_REPLIES)
    max_tokens: int | None = option(
        None, "longest reply to a student in tokens; default: what the context leaves", low=1,
        high=MOST_TOKENS)


@dataclass(slots=True)
class Person:
    """Somebody who has been here."""

    caller: Caller
    last_seen: float
    account: Account = field(default_factory=Account)


@dataclass(frozen=True, slots=True)
class PersonRow:
    """A person, as the host sees them.

    Attributes:
        seen_s: seconds since the last request.
        running: replies that are being written.
        waiting: replies that have no token yet.
        replies, tokens: all so far.
    """

    id: str
    name: str
    role: Role
    seen_s: float
    running: int
    waiting: int
    replies: int
    tokens: int
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class ClassStatus:
    """The class at a moment; people in order of their arrival."""

    people: tuple[PersonRow, ...]
    paused: bool
    limits: StudentLimits
    running: int
    waiting: int
    tokens: int
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Invitation:
    """What a host sends to students: the way here by ssh, where the page is then, and the key."""

    tunnel: str
    url: str
    key: str


class Classroom:
    """People and their open work. Belongs to one event loop.

    Args:
        has_hosts: there are host keys, so that people without one are students, and have names.
        limits: of all work together.
        clock: seconds, monotonic.
        keep: told whenever a host has changed something that should outlive the server.

    Attributes:
        paused: students get no new replies.
        student_limits: see there.
    """

    def __init__(
        self,
        has_hosts: bool = False,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        keep: Callable[[Classroom], None] = lambda classroom: None,
    ) -> None:
        self.has_hosts = has_hosts
        self.admission = Admission(limits, clock)
        self.paused = False
        self.student_limits = StudentLimits()
        self._clock, self._keep = clock, keep
        self._people: dict[str, Person] = {}

    def see(self, caller: Caller) -> Person:
        """Note that `caller` is here, perhaps under a new name."""
        person = self._people.get(caller.id)
        if person is None:
            self._forget_some()
            person = self._people[caller.id] = Person(caller, 0.0)
        person.caller, person.last_seen = caller, self._clock()
        return person

    def admit(self, caller: Caller, replies: int = 1) -> Ticket:
        """Room for replies to `caller`: whatever writes one, on page or API, holds the ticket.

        Raises:
            ClassPausedError: see there.
            RateLimitError, OverloadedError, UserError: see `Admission.admit`.
        """
        if caller.role is Role.STUDENT and self.paused:
            raise ClassPausedError
        return self.admission.admit(self.see(caller).account, replies, self._most(caller))

    def has_room(self, caller: Caller, replies: int) -> bool:
        """Whether `caller`'s share lets so many more be open at this moment."""
        most = self._most(caller)
        return most is None or self.see(caller).account.open + replies <= most

    def _most(self, caller: Caller) -> int | None:
        """Replies that `caller` may have open; None: as many as there is room for."""
        if caller.role is Role.STUDENT:
            return self.student_limits.max_replies
        return self.admission.limits.max_per_caller if caller.id else None

    def bounded(self, caller: Caller, sampling: SamplingParams) -> SamplingParams:
        """`sampling` with no longer a reply than `caller` may have."""
        most = self.student_limits.max_tokens
        if caller.role is not Role.STUDENT or most is None:
            return sampling
        return replace(sampling, max_tokens=min(sampling.max_tokens or most, most))

    async def reply(
        self,
        caller: Caller,
        backend: ChatBackend,
        messages: Sequence[Message],
        sampling: SamplingParams,
        model: str | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """`ChatBackend.stream` for `caller`, admitted, bounded and counted.

        Raises:
            UserError: as `admit` and the backend do.
        """
        with self.admit(caller) as ticket:
            stream = backend.stream(
                messages, self.bounded(caller, sampling), model=model, owner=caller.id)
            async with aclosing(counted(stream, ticket, 0)) as deltas:
                async for delta in deltas:
                    yield delta

    # What hosts do

    def pause(self, by: Caller) -> None:
        """Refuse students new replies; those that are open go on. Raises HostOnlyError."""
        require_host(by)
        self.paused = True
        self._keep(self)

    def resume(self, by: Caller) -> None:
        """End the pause. Raises HostOnlyError."""
        require_host(by)
        self.paused = False
        self._keep(self)

    def set_limits(self, by: Caller, limits: StudentLimits) -> None:
        """Change what a student may have; replies that are open go on.

        Raises:
            HostOnlyError: see there.
            UserError: a number is out of bounds.
        """
        require_host(by)
        validate(limits)
        self.student_limits = limits
        self._keep(self)

    def snapshot(self, by: Caller) -> ClassStatus:
        """What a host sees of the class. Raises HostOnlyError."""
        require_host(by)
        now, total = self._clock(), self.admission.total
        people = tuple(
            PersonRow(
                person.caller.id, person.caller.name, person.caller.role, now - person.last_seen,
                account.open - account.waiting, account.waiting, account.replies,
                account.tokens.total, account.tokens.rate(now))
            for person in self._people.values() for account in [person.account])
        return ClassStatus(
            people, self.paused, self.student_limits, total.open - total.waiting, total.waiting,
            total.tokens.total, total.tokens.rate(now))

    def _forget_some(self) -> None:
        """Make room for one more. Who has replies open stays; admission bounds how many do."""
        idle = [id for id, person in self._people.items() if not person.account.open]
        idle.sort(key=lambda id: self._people[id].last_seen)
        for id in idle[:max(0, len(self._people) + 1 - MAX_PEOPLE)]:
            del self._people[id]


async def counted(
    deltas: AsyncGenerator[Delta, None], ticket: Ticket, prompt_tokens: int
) -> AsyncGenerator[Delta, None]:
    """One of the replies of `ticket`, told to it as it comes."""
    waiting, tokens = True, 0
    async with aclosing(deltas):
        async for delta in deltas:
            if waiting:
                waiting = False
                ticket.started(prompt_tokens)
            known = delta.stats.completion_tokens if delta.stats else delta.num_tokens
            if known > tokens:  # a remote server tells at the end only
                ticket.wrote(known - tokens)
                tokens = known
            yield delta


def caller_of(scope: Mapping[str, Any]) -> Caller:
    """Who sent the request of an ASGI scope; the guard has found out."""
    caller: Caller = scope[SCOPE_KEY]
    return caller


def require_host(caller: Caller) -> None:
    """Raises HostOnlyError unless `caller` is a host."""
    if caller.role is not Role.HOST:
        raise HostOnlyError


def clean_name(text: str) -> str:
    """A person's name as it is shown: its blanks single, its characters printable.

    Raises:
        UserError: it is none.
    """
    name = " ".join(unicodedata.normalize("NFC", text[:1000]).split())
    if not name:
        raise UserError("A name is needed.", "Enter the one that the host knows you by.",
                        field="name")
    if len(name) > MAX_NAME or not name.isprintable() or "\ufffd" in name:
        raise UserError(
            "The name is too long or has unusual characters.",
            f"Use up to {MAX_NAME} letters, digits and signs.", field="name")
    return name
