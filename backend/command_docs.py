"""docs/commands: a page for each command, made of the parser, in English and in Chinese.

The Chinese of each text is in docs/commands/zh.json, by its English; a text that is not there stays
English. `make docs` writes the pages.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from backend.command_line import subcommands

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "commands"
DEFAULT = re.compile(r" \(default: ([^()]+)\)$")
LABELS = ("Made from the command line's own help by `make docs`.", "argument", "meaning", "one of",
          "or", "default")  # fmt: skip
Translate = Callable[[str], str]


def pages(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Every page, by its file's name."""
    found = {}
    other = chinese()
    languages: tuple[tuple[str, str, Translate], ...] = (
        ("", "[中文]({}.zh.md)", lambda text: text),
        (".zh", "[English]({}.md)", lambda text: other.get(text, text)),
    )
    for name, command in subcommands(parser).items():
        for suffix, link, say in languages:
            head = [f"# {name}", "", link.format(name), "", say(LABELS[0])]
            lines = [*head, *_command(name, command, say, 2)]
            found[f"{name}{suffix}.md"] = "\n".join(lines) + "\n"
    return found


def chinese() -> dict[str, str]:
    """The Chinese of each text."""
    found: dict[str, str] = json.loads((FOLDER / "zh.json").read_text(encoding="utf-8"))
    return found


def texts(parser: argparse.ArgumentParser) -> set[str]:
    """Every text that the pages have, in English."""
    seen = set(LABELS)

    def note(text: str) -> str:
        seen.add(text)
        return text

    for name, command in subcommands(parser).items():
        list(_command(name, command, note, 2))
    return seen


def write(parser: argparse.ArgumentParser) -> None:
    """Write every page."""
    for name, text in pages(parser).items():
        (FOLDER / name).write_text(text, encoding="utf-8")


def _command(
    path: str, command: argparse.ArgumentParser, say: Translate, level: int
) -> Iterator[str]:
    yield from ("", say(command.description or ""))
    if choices := subcommands(command):
        for name, sub in choices.items():
            yield from ("", f"{'#' * level} {path} {name}")
            yield from _command(f"{path} {name}", sub, say, level + 1)
        return
    if command.epilog:
        yield from ("", *(f"    {line.strip()}" for line in command.epilog.splitlines()[1:]))
    for group in command._action_groups:
        actions = [action for action in group._group_actions
                   if action.dest != "help" and action.help != argparse.SUPPRESS]  # fmt: skip
        if not actions:
            continue
        if group.title not in ("positional arguments", "options", None):
            yield from ("", f"**{say(group.title)}**")
        yield from ("", f"| {say('argument')} | {say('meaning')} |", "|---|---|")
        yield from (_row(action, say) for action in actions)


def _row(action: argparse.Action, say: Translate) -> str:
    text, default = (action.help or "").replace("%%", "%"), ""
    if found := DEFAULT.search(text):
        text, default = text[: found.start()], f" ({say('default')}: {found[1]})"
    if default or not text.startswith("default: "):
        text = say(text)
    choices = ""
    if action.choices is not None:
        choices = f"; {say('one of')} " + ", ".join(f"`{choice}`" for choice in action.choices)
    names = f" {say('or')} ".join(f"`{name}`" for name in action.option_strings)
    name = names or f"`{action.metavar or action.dest}`"
    return f"| {name} | {text}{choices}{default} |"
