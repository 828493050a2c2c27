"""Question patterns: ``[a|b|]`` is one of its alternatives, ``{x}`` a place to fill."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern: strings, and tuples of alternatives that are patterns themselves."""

    parts: tuple[str | tuple[Pattern, ...], ...]

    def expand(self, rng: random.Random) -> str:
        """One of the texts the pattern stands for, alternatives chosen evenly."""
        return "".join(
            part if isinstance(part, str) else rng.choice(part).expand(rng) for part in self.parts
        )

    def count(self) -> int:
        """How many texts the pattern stands for."""
        total = 1
        for part in self.parts:
            if not isinstance(part, str):
                total *= sum(alternative.count() for alternative in part)
        return total


def parse(text: str) -> Pattern:
    """Parses a pattern. Raises ValueError if a bracket has no partner."""
    pattern, end = _parse(text, 0, nested=False)
    if end != len(text):
        raise ValueError(f"unbalanced brackets in the pattern {text!r}")
    return pattern[0]


def _parse(text: str, position: int, nested: bool) -> tuple[tuple[Pattern, ...], int]:
    """Parses alternatives up to the closing bracket (or the end); returns them and the place."""
    alternatives: list[Pattern] = []
    parts: list[str | tuple[Pattern, ...]] = []
    plain = ""
    while position < len(text):
        character = text[position]
        if character == "[":
            parts.append(plain)
            plain = ""
            inner, position = _parse(text, position + 1, nested=True)
            parts.append(inner)
            continue
        if character == "]":
            if not nested:
                raise ValueError(f"unbalanced brackets in the pattern {text!r}")
            alternatives.append(Pattern((*parts, plain)))
            return tuple(alternatives), position + 1
        if character == "|" and nested:
            alternatives.append(Pattern((*parts, plain)))
            parts, plain = [], ""
        else:
            plain += character
        position += 1
    if nested:
        raise ValueError(f"unbalanced brackets in the pattern {text!r}")
    return (Pattern((*parts, plain)),), position
