"""Bounded admission: too much work is refused at once, before it costs memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from backend.errors import OverloadedError, UserError

RATE_SECONDS = 5.0  # what happened so long ago counts 1/e in a rate


class RateLimitError(UserError):
    """One caller has too many replies open."""

    status = 429
    code = "rate_limit_exceeded"


@dataclass(frozen=True)
class Limits:
    """How much work may be open at a time.

    `max_waiting` replies may wait for their first token, `max_waiting_tokens` prompt tokens among
    them; one caller may have `max_per_caller` replies open, waiting or running. The last is below
    the sum of a full batch and a full queue, so that no single one locks the others out; without
    keys there is nobody else, and it does not apply.
    """

    max_waiting: int = 256
    max_waiting_tokens: int = 512 * 1024
    max_per_caller: int = 256


@dataclass(slots=True)
class TokenMeter:
    """Tokens so far, and how many come a second: a mean over the last seconds."""

    total: int = 0
    _rate: float = 0.0
    _at: float = 0.0

    def add(self, tokens: int, now: float) -> None:
        self._rate = self.rate(now) + tokens / RATE_SECONDS
        self._at = now
        self.total += tokens

    def rate(self, now: float) -> float:
        """Tokens a second."""
        return self._rate * math.exp((self._at - now) / RATE_SECONDS)


@dataclass(slots=True)
class Account:
    """One caller's work: replies that are open, those of them that wait, and all there were."""

    open: int = 0
    waiting: int = 0
    replies: int = 0
    tokens: TokenMeter = field(default_factory=TokenMeter)


class Admission:
    """Counts open work. Belongs to one event loop.

    Attributes:
        total: of all callers together.
        waiting_tokens: of the prompts whose replies wait.
    """

    def __init__(
        self, limits: Limits | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits = limits or Limits()
        self.clock = clock
        self.total = Account()
        self.waiting_tokens = 0

    def admit(self, account: Account, replies: int, most: int | None = None) -> Ticket:
        """Room for `replies` of a caller.

        Args:
            account: the caller's, in which they are counted.
            most: replies that the caller may have open; None: as many as there is room for.

        Raises:
            UserError: no queue could ever hold so many.
            RateLimitError: the caller's share is used up.
            OverloadedError: the queue is full.
        """
        bound = self.limits.max_waiting if most is None else min(most, self.limits.max_waiting)
        if replies > bound:
            raise UserError(
                f"The request asks for {replies} replies, but at most {bound} may be open at a "
                "time.", "Lower n, or send fewer prompts.", field="n")
        if most is not None and account.open + replies > most:
            raise RateLimitError(
                f"You have {account.open} replies open; at most {most} may be.",
                "Wait until some are finished.")
        if self.total.waiting + replies > self.limits.max_waiting:
            raise OverloadedError(
                f"The queue is full: {self.total.waiting} requests wait.", "Try again later.")
        return Ticket(self, account, replies)


class Ticket:
    """Admitted work: `with` it, tell it of the prompts, of every first token, and of all tokens."""

    def __init__(self, admission: Admission, account: Account, replies: int) -> None:
        self._admission = admission
        self._accounts = (account, admission.total)
        self._replies = replies
        self._waiting: list[int] = [0] * replies  # prompt tokens of the replies that wait
        for counted in self._accounts:
            counted.waiting += replies
            counted.open += replies
            counted.replies += replies

    def set_prompts(self, tokens: list[int]) -> None:
        """Tell the prompt tokens of each reply, once they are known.

        Raises:
            UserError: no queue could ever hold so many.
            OverloadedError: the queue cannot at the moment.
        """
        admission, most = self._admission, self._admission.limits.max_waiting_tokens
        if sum(tokens) > most:
            raise UserError(
                f"The request's prompts have {sum(tokens)} tokens together; at most {most} may "
                "wait.", "Send fewer prompts at a time.", field="prompt")
        if admission.waiting_tokens + sum(tokens) > most:
            raise OverloadedError(
                f"The queue is full: {admission.waiting_tokens} prompt tokens wait.",
                "Try again later.")
        admission.waiting_tokens += sum(tokens)
        self._waiting = tokens

    def started(self, tokens: int) -> None:
        """A reply to a prompt of so many tokens has its first token, and waits no longer."""
        self._waiting.remove(tokens)
        self._admission.waiting_tokens -= tokens
        for counted in self._accounts:
            counted.waiting -= 1

    def wrote(self, tokens: int) -> None:
        """So many more tokens have come."""
        now = self._admission.clock()
        for counted in self._accounts:
            counted.tokens.add(tokens, now)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._admission.waiting_tokens -= sum(self._waiting)
        for counted in self._accounts:
            counted.waiting -= len(self._waiting)
            counted.open -= self._replies
        self._waiting, self._replies = [], 0
