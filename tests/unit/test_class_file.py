"""A class's limits and pause after the server has ended."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

import app
from backend.class_file import PAUSE_SECONDS, ClassFile, open_class
from backend.classroom import Caller, Classroom, StudentLimits
from backend.config import ServerConfig
from backend.server import listen
from backend.services import Services
from tests.e2e.fake_chat import FakeChat

HOST = Caller("h", "Ms Li")
LIMITS = StudentLimits(2, 512)


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_the_same_command_line_finds_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMDESK_HOME", str(tmp_path))
    found: list[tuple[bool, StudentLimits]] = []

    async def serve_forever(web: Any, sock: Any, server: Any, services: Services, *_: Any) -> None:
        sock.close()
        classroom = services.classroom
        found.append((classroom.paused, classroom.student_limits))
        classroom.set_limits(HOST, LIMITS)
        classroom.pause(HOST)

    monkeypatch.setattr(listen, "serve_forever", serve_forever)
    for host_key in ("first-host-key", "new"):
        server = ServerConfig(server_port=0, host_keys=(host_key,), api_keys=("class-key",))
        asyncio.run(app.serve(Services(FakeChat()), server, fixed_port=True, with_page=False))
    assert found == [(False, StudentLimits()), (True, LIMITS)]
    assert open_class(1).student_limits == StudentLimits()  # another port's


def test_a_forgotten_pause_ends_and_limits_stay(tmp_path: Path) -> None:
    clock = Clock()
    file = ClassFile(tmp_path / "classes" / "x.json", clock)
    first = file.open()
    first.pause(HOST)
    first.set_limits(HOST, LIMITS)
    clock.now += PAUSE_SECONDS - 1
    assert file.open().paused
    clock.now += 2
    late = file.open()
    assert not late.paused and late.student_limits == LIMITS and late.has_hosts
    first.resume(HOST)
    assert not file.open().paused
    assert [path.name for path in file.path.parent.iterdir()] == ["x.json"]


@pytest.mark.parametrize("text", [
    "", "{", "[]", "7", '{"paused": true}', '{"limits": 3, "paused": true, "written": 0}',
    json.dumps({"limits": {"max_replies": 0}, "paused": True, "written": 0}),
    json.dumps({"limits": {"other": 1}, "paused": True, "written": 0}),
    json.dumps({"limits": {"max_replies": 2}, "paused": True, "written": "now"}),
    "9" * 10_000])
def test_a_file_that_is_none_makes_no_class_fail(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    room = ClassFile(path).open()
    assert (room.paused, room.student_limits) == (False, StudentLimits())
    assert str(path) in caplog.text
    room.pause(HOST)  # and is kept from now on
    assert ClassFile(path).open().paused


def test_a_folder_that_cannot_be_written_makes_no_class_fail(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        room: Classroom = ClassFile(tmp_path / "file" / "x.json").open()
        room.pause(HOST)
    assert room.paused and "not kept beyond this run" in caplog.text
