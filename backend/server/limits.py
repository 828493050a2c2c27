"""Bounded admission: too much work is refused at once, before it costs memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from backend.errors import OverloadedError, UserError


class RateLimitError(UserError):
    """One key has too many replies open."""

    status = 429
    code = "rate_limit_exceeded"


@dataclass(frozen=True)
class Limits:
    """How much work may be open at a time.

    `max_waiting` replies may wait for their first token, `max_waiting_tokens` prompt tokens among
    them; one key may have `max_per_key` replies open, waiting or running. The last is below the
    sum of a full batch and a full queue, so that no single key locks the others out; without keys
    there is nobody else, and it does not apply.
    """

    max_waiting: int = 256
    max_waiting_tokens: int = 512 * 1024
    max_per_key: int = 256


class Admission:
    """Counts open work. Belongs to one event loop."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting = 0
        self.waiting_tokens = 0
        self.open_by_key: Counter[str] = Counter()

    def admit(self, key: str, replies: int) -> Ticket:
        """Room for `replies` of the holder of `key` ("" where there are no keys).

        Raises:
            UserError: no queue could ever hold so many.
            RateLimitError: the key's share is used up.
            OverloadedError: the queue is full.
        """
        limits = self.limits
        most = min(limits.max_waiting, limits.max_per_key) if key else limits.max_waiting
        if replies > most:
            raise UserError(
                f"The request asks for {replies} replies, but at most {most} may be open at a "
                "time.", "Lower n, or send fewer prompts.", field="n")
        if key and self.open_by_key[key] + replies > limits.max_per_key:
            raise RateLimitError(
                f"This API key has {self.open_by_key[key]} replies open; at most "
                f"{limits.max_per_key} may be.", "Wait until some are finished.")
        if self.waiting + replies > limits.max_waiting:
            raise OverloadedError(
                f"The queue is full: {self.waiting} requests wait.", "Try again later.")
        return Ticket(self, key, replies)


class Ticket:
    """Admitted work: `with` it, tell it of the prompts and of every first token."""

    def __init__(self, admission: Admission, key: str, replies: int) -> None:
        self._admission = admission
        self._key = key
        self._replies = replies
        self._waiting: list[int] = [0] * replies  # prompt tokens of the replies that wait
        admission.waiting += replies
        admission.open_by_key[key] += replies

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
        self._admission.waiting -= 1
        self._admission.waiting_tokens -= tokens

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *exc_info: object) -> None:
        admission = self._admission
        admission.waiting -= len(self._waiting)
        admission.waiting_tokens -= sum(self._waiting)
        admission.open_by_key[self._key] -= self._replies
        if not admission.open_by_key[self._key]:
            del admission.open_by_key[self._key]  # keys come and go only with restarts, but tidy
        self._waiting, self._replies = [], 0
