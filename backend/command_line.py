"""How a command line is read: commands, flags by group, and mistakes told in one sentence."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from backend import command_spelling as spelling, config
from backend.errors import UserError

LOG_LEVELS = ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG")


class Parser(argparse.ArgumentParser):
    """Tells mistakes as all others are told: one sentence, not after a screen of usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}.", f"See: python {self.prog} --help")


def add_command(
    group: Any, name: str, text: str, run: Callable[..., Any], *settings: type,
    examples: Sequence[str] = (),
) -> argparse.ArgumentParser:
    """Add a command, with a flag for each field of `settings`, grouped as they are.

    Args:
        group: argparse's subparsers.
        text: what it does, in a line.
        examples: command lines that its help shows, without `python app.py`.
    """
    sub: argparse.ArgumentParser = group.add_parser(
        name, help=text, description=text, epilog=epilog(examples), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    sub.set_defaults(run=run)
    for cls in settings:
        title = (cls.__doc__ or "").splitlines()[0].partition(".")[0]
        config.add_arguments(sub.add_argument_group(title), cls)
    return sub


def epilog(examples: Sequence[str]) -> str | None:
    """The end of a command's help: examples."""
    return "\n  ".join(["examples:", *(f"python app.py {line}" for line in examples)]) if (
        examples) else None


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The commands that a parser chooses among; none if it is a command itself."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def flags(parser: argparse.ArgumentParser) -> list[str]:
    """Every flag of a command."""
    return [flag for action in parser._actions for flag in action.option_strings]


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Read a command line in any of the spellings that `command_spelling` knows.

    What is left out of it is told on standard error.

    Raises:
        UserError: an unknown command or flag, or a value of the wrong kind.
    """
    words = spelling.without_module(list(argv))
    command: spelling.Command = ()
    chosen = parser
    while choices := subcommands(chosen):
        name = spelling.COMMANDS.get((*command, *words[:1]), "".join(words[:1]).replace("-", "_"))
        if name in choices:
            del words[0]
        elif command in spelling.DEFAULTS and words[:1] not in (["-h"], ["--help"]):
            _check_no_command(words, choices)
            name = spelling.DEFAULTS[command]
        else:
            break
        command, chosen = (*command, name), choices[name]
    respelled = spelling.respell(command, words, flags(chosen))
    args, unknown = parser.parse_known_args([*command, *respelled.argv])
    if unknown:
        raise UserError(f"unrecognized arguments: {' '.join(unknown)}.", _hint(unknown, chosen))
    for notice in respelled.notices:
        print(f"lmdesk: {notice}", file=sys.stderr)
    return args


def _check_no_command(words: list[str], choices: dict[str, argparse.ArgumentParser]) -> None:
    """What stands where a command may stand is a model; unless it is a command, mistyped."""
    word = "".join(words[:1])
    near = difflib.get_close_matches(word, choices, 1, 0.8)
    if near and not os.path.exists(word):
        raise UserError(f"There is no command and no folder {word}.", f"Did you mean {near[0]}?")


def _hint(unknown: list[str], parser: argparse.ArgumentParser) -> str:
    """The flag of the chosen command that was perhaps meant, else where its flags are told."""
    own = [flag for flag in flags(parser) if flag not in ("-h", "--help")]
    near = difflib.get_close_matches(unknown[0].partition("=")[0], own, 1)
    return f"Did you mean {near[0]}?" if near else f"See: python {parser.prog} --help"
