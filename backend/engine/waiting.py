"""Who is next: owners take turns, and each one's requests come in their order.

Round robin by owner (Nagle, RFC 970; fair queuing), with the difference that those go first who
have fewest sequences running already. So a thousand requests of one student delay another's first
one by no more than the place that becomes free next, or, if more students wait for a first one, by
one request of each who waited before.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator

from backend.engine.types import Sequence


class WaitingQueue:
    """Sequences that wait for a place in the batch. Iterates over them in no particular order."""

    def __init__(self) -> None:
        self._returned: deque[Sequence] = deque()  # were running, and go before all others
        self._by_owner: dict[str, deque[Sequence]] = {}  # whose turn is next, first; none empty

    def __len__(self) -> int:
        return len(self._returned) + sum(map(len, self._by_owner.values()))

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._returned
        for own in self._by_owner.values():
            yield from own

    def add(self, seq: Sequence) -> None:
        """The last of its owner's; an owner who had none waiting is the last in turn."""
        self._by_owner.setdefault(seq.request.owner, deque()).append(seq)

    def put_back(self, seq: Sequence) -> None:
        """Before all others: it has lost its place to memory, not to anybody's turn."""
        self._returned.appendleft(seq)

    def next(self, running: Iterable[Sequence]) -> Sequence:
        """Whose turn it is; stays in the queue. There must be one."""
        if self._returned:
            return self._returned[0]
        owners = iter(self._by_owner)
        if len(self._by_owner) > 1:
            count = Counter(seq.request.owner for seq in running)
            return self._by_owner[min(owners, key=lambda owner: count[owner])][0]  # the first such
        return self._by_owner[next(owners)][0]

    def take(self, seq: Sequence) -> None:
        """Remove what `next` gave, because it runs now; its owner is the last in turn."""
        if self._returned and self._returned[0] is seq:
            self._returned.popleft()
            return
        own = self._by_owner.pop(seq.request.owner)
        own.popleft()
        if own:
            self._by_owner[seq.request.owner] = own

    def remove(self, request_id: str) -> Sequence | None:
        """Take a request out, wherever it stands; None if it is not here."""
        for seq in self:
            if seq.request_id == request_id:
                break
        else:
            return None
        if seq in self._returned:
            self._returned.remove(seq)
            return seq
        own = self._by_owner[seq.request.owner]
        own.remove(seq)
        if not own:
            del self._by_owner[seq.request.owner]
        return seq
