"""Token ids to text, piece by piece: never half a character, never the start of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from backend.tokenizer import Tokenizer


class Detokenizer:
    """Turns one reply's tokens into text as they come.

    However the ids are split over calls of `add`, the pieces and `finish` together are
    `tokenizer.decode(ids, skip_special_tokens)`, cut where the first of the stop strings begins.

    Args:
        tokenizer: gives each token's bytes.
        stop: strings that end the reply and are not part of it.
        skip_special_tokens: these have no text; else they show as they are spelled.
        continues: there is text before it, so that its first spaces are its own.

    Attributes:
        stopped: the stop string that was met, or None so far. The shortest, if several begin at
            the same place.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), skip_special_tokens: bool = True,
        continues: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._stop = sorted(filter(None, stop), key=len)
        self.stopped: str | None = None
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._spaces_to_strip = 0 if continues else tokenizer.leading_spaces
        self._held = ""  # characters that may turn out to begin a stop string

    @property
    def holds(self) -> bool:
        """Whether characters are held back, since they may begin a stop string."""
        return bool(self._held)

    def add(self, token_ids: Iterable[int]) -> str:
        """Text that is certain after these ids too; "" once a stop string was met."""
        raw = b"".join(
            self._tokenizer.token_bytes(i) for i in token_ids if i not in self._skipped)
        return self._release(self._utf8.decode(self._strip(raw)), final=False)

    def finish(self) -> str:
        """What was held back. Unfinished characters become U+FFFD."""
        return self._release(self._utf8.decode(b"", final=True), final=True)

    def _strip(self, raw: bytes) -> bytes:
        """Take off the spaces that the encoder had put before the text."""
        while self._spaces_to_strip and raw:
            if raw[0] == 0x20:
                raw = raw[1:]
                self._spaces_to_strip -= 1
            else:
                self._spaces_to_strip = 0
        return raw

    def _release(self, text: str, *, final: bool) -> str:
        """Let out what no stop string can claim any more."""
        if self.stopped is not None:
            return ""
        text = self._held + text
        end = len(text) if final else self._first_unfinished_stop(text)
        # A stop string that may yet be completed goes before those that begin after it.
        found = [(at, s) for s in self._stop if 0 <= (at := text.find(s)) <= end]
        if found:
            end, self.stopped = min(found, key=lambda match: match[0])
        self._held = "" if final or found else text[end:]
        return text[:end]

    def _first_unfinished_stop(self, text: str) -> int:
        """Where the longest end of `text` lies that begins a stop string; its length if none."""
        first = len(text)
        for stop in self._stop:
            at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= at < first:
                if stop.startswith(text[at:]):
                    first = at
                    break
                at = text.find(stop[0], at + 1)
        return first
