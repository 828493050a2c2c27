"""docs/commands is what the parser says; every command helps."""

from __future__ import annotations

import argparse
import json
import shlex
import tomllib
from collections.abc import Iterator

import pytest

import app
from backend import command_docs
from backend.command_line import subcommands
from tests.app_process import ROOT


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for sub in subcommands(parser).values():
        yield from commands(sub)


def test_the_pages_are_made_of_the_parser() -> None:
    for name, text in command_docs.pages(app.make_parser()).items():
        page = command_docs.FOLDER / name
        assert page.is_file() and page.read_text(encoding="utf-8") == text, f"{name}: make docs"


def test_nearly_every_text_has_its_chinese() -> None:
    chinese = json.loads((command_docs.FOLDER / "zh.json").read_text(encoding="utf-8"))
    texts = command_docs.texts(app.make_parser())
    missing = texts - chinese.keys() - {""}
    assert len(missing) < 0.15 * len(texts), missing  # a flag may be there a little sooner


def test_every_command_shows_examples_that_are_its_own() -> None:
    for command in commands(app.make_parser()):
        if subcommands(command):
            continue
        lines = (command.epilog or "").splitlines()[1:]
        assert lines, command.prog
        for line in lines:
            words = shlex.split(line.strip().removeprefix("python app.py"))
            args = app.parse(words)
            assert args.run is command.get_default("run"), line


def test_every_command_and_every_argument_has_help() -> None:
    for command in commands(app.make_parser()):
        assert command.description, command.prog
        assert command.format_help()
        for action in command._actions:
            if not isinstance(action, argparse._SubParsersAction):
                assert action.help, f"{command.prog}: {action.dest}"


def test_help_of_a_group_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["chat", "--help"], ["--help"], ["serve", "-h"]):
        with pytest.raises(SystemExit) as ended:
            app.main(words)
        assert ended.value.code == 0 and "usage: app.py" in capsys.readouterr().out


def test_the_console_script_is_this_command_line() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    module, _, function = project["project"]["scripts"]["lmdesk"].partition(":")
    assert (module, function) == ("app", "main") and callable(app.main)
    assert project["tool"]["setuptools"]["py-modules"] == [module]
