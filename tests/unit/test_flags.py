"""Flags and small commands of the command line."""

from __future__ import annotations

import pytest

import app


def test_list_prints_every_chat_format(capsys) -> None:
    from backend import chat_formats

    assert app.main(["list"]) == 0
    assert capsys.readouterr().out.split() == chat_formats.names()


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("serve api_server --sever_port 1", "--server-port"),
        ("lite auto_awq M --w-goup-size=64", "--w-group-size"),
        ("--max-batchsize 8", "--max-batch-size"),
    ],
)
def test_a_mistyped_flag_is_answered_with_the_nearest(line, meant, capsys) -> None:
    assert app.main(line.split()) == 2
    assert capsys.readouterr().err.endswith(f"Did you mean {meant}?\n")
