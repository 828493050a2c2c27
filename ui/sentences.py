"""The backend's sentences in the reader's language; English stays the truth.

`assets/locales/<locale>/errors.json` maps templates as they stand in the source, such as "There is
no folder {name}.", to the same in that language. A sentence that fits a template is said by its
translation, with the same values; any other stays English.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import islice

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from backend.errors import UserError
from ui.i18n import DEFAULT_LOCALE, ERRORS, LOCALES, catalogs, locale_of

SENTENCE = "/page/sentence"  # see page.js
DEPTH = 3  # of sentences in sentences
MOST_SENTENCES = 8  # in a row, of which the first may be the message
LONGEST = 2000  # characters that are looked at; a longer text is a listing, not a sentence
WEAK = 24  # own characters; with fewer, "{key} is missing." fits sentences that are not ours
QUOTATIONS = ("''", '""', "[]", "{}")  # first and last character
FULL_STOPS = ("。", "！", "？")  # no blank follows these


@dataclass(frozen=True)
class Template:
    """A sentence with placeholders, cut at them: `pieces` are one more than `names`."""

    pieces: tuple[str, ...]
    names: tuple[str, ...]
    translation: str

    @classmethod
    def of(cls, english: str, translation: str) -> Template:
        """From a catalogue's line."""
        pieces, names = [""], []
        for literal, name, _, _ in string.Formatter().parse(english):
            pieces[-1] += literal
            if name is not None:
                names.append(name)
                pieces.append("")
        return cls(tuple(pieces), tuple(names), translation)

    @property
    def length(self) -> int:
        """Characters outside the placeholders."""
        return sum(map(len, self.pieces))

    def match(self, text: str) -> dict[str, str] | None:
        """The placeholders' values if `text` is this sentence, each as short as can be.

        By searching piece after piece, which is linear: texts may come from strangers, and a
        regular expression with several placeholders can be made to search for minutes.
        """
        first, last = self.pieces[0], self.pieces[-1]
        if not self.names:
            return {} if text == first else None
        end = len(text) - len(last)
        if not text.startswith(first) or not text.endswith(last) or end < len(first):
            return None
        at, values = len(first), dict[str, str]()
        for name, piece in zip(self.names, [*self.pieces[1:-1], None]):
            found = end if piece is None else text.find(piece, at, end)
            if found < 0 or values.setdefault(name, text[at:found]) != text[at:found]:
                return None
            at = found + len(piece or "")
        return values


@cache
def templates(locale: str) -> tuple[Template, ...]:
    """Of a locale, those with most words of their own first, and what has no end of its own last;
    none where there is no catalogue."""
    path = LOCALES / locale / ERRORS
    if locale not in catalogs() or not path.is_file():
        return ()
    own = {text: catalogs()[locale][key] for key, text in catalogs()[DEFAULT_LOCALE].items()
           if key.startswith("error.")}  # said before anybody knew for whom
    known: Mapping[str, str] = own | json.loads(path.read_text(encoding="utf-8"))
    found = [Template.of(english, translation) for english, translation in known.items()]
    return tuple(sorted(found, key=lambda template: (not template.pieces[-1], -template.length)))


@lru_cache(maxsize=4096)
def translated(text: str, locale: str, depth: int = DEPTH) -> str:
    """`text`, a sentence of the backend or a message and its hint, in `locale` if it is known.

    Values are translated too: a sentence may quote another.
    """
    if not text or len(text) > LONGEST or not templates(locale):
        return text
    for border in islice(re.finditer(r"(?<=[.?]) ", text), MOST_SENTENCES):
        sentences = text[:border.start()], text[border.end():]
        parts = [_known(part, locale, depth) for part in sentences]
        if None not in parts:
            return joined(*map(str, parts))
    return _known(text, locale, depth) or text


def error_text(error: UserError, locale: str) -> str:
    """Message and hint, each in `locale` if it is known."""
    return joined(translated(error.message, locale), translated(error.hint, locale))


def told(words: Mapping[str, str], locale: str) -> str:
    """The same for an error as a job tells it: {"message": ..., "hint": ...}."""
    return error_text(UserError(words.get("message", ""), words.get("hint", "")), locale)


def in_words(request: Request) -> Response:
    """The page's own route for its status bar, which gets English from the API."""
    text = request.query_params.get("text", "")
    return PlainTextResponse(translated(text, locale_of(request)))


def joined(message: str, hint: str) -> str:
    """Two sentences in a row."""
    return f"{message}{'' if message.endswith(FULL_STOPS) else ' '}{hint}".strip()


def _known(text: str, locale: str, depth: int) -> str | None:
    for template in templates(locale):
        values = template.match(text)
        if values is not None:
            said = {name: translated(value, locale, depth - 1) if depth else value
                    for name, value in values.items()}
            if not _swallows(template, values, said):
                return template.translation.format(**said)
    return None


def _swallows(template: Template, values: Mapping[str, str], said: Mapping[str, str]) -> bool:
    """Whether a weak template has taken another sentence's words for values.

    Values are names, numbers, lists and quotations, or known sentences; behind a colon, anything.
    """
    weak = not template.pieces[0] and template.length < WEAK
    return (weak or not template.pieces[-1]) and any(
        not before.endswith(": ") and value == said[name] and " " in value.replace(", ", ",")
        and value[0] + value[-1] not in QUOTATIONS
        for before, name in zip(template.pieces, template.names) for value in [values[name]])
