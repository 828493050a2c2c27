"""The terminal chat, fed with a script, over a scripted backend."""

from __future__ import annotations

import asyncio
import io
import os
import pty
import select
import signal
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from backend.chat import ChatService, Delta, Message, ReplyStats, ServiceStatus
from backend.config import EngineConfig, SamplingParams
from backend.console import chat
from backend.conversation import OwnConversation
from backend.engine.async_engine import AsyncEngine
from backend.engine.launcher import ProcessHandle
from backend.errors import ContextLengthError, EngineNotReadyError, UserError
from tests.server.support import LastMessage, byte_tokenizer

STATS = ReplyStats(12, 34, 5, 0.125, 56.78)
SAMPLING = SamplingParams(max_tokens=99)
Reply = list[str | Exception | Callable[[], Any]]


class Backend:
    """Plays `replies` one after another: text is said, an error raised, a function called."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.seen: list[list[tuple[str, str]]] = []
        self.closed = 0

    async def models(self) -> list[str]:
        return ["m"]

    async def status(self) -> ServiceStatus:
        return ServiceStatus("ready", "m")

    async def count_tokens(self, messages: Sequence[Message]) -> int | None:
        return None

    async def stream(
        self, messages: Sequence[Message], sampling: SamplingParams, *,
        stop: Sequence[str] = (), model: str | None = None,
    ) -> AsyncGenerator[Delta, None]:
        assert sampling is SAMPLING
        self.seen.append([(m["role"], m["content"]) for m in messages])
        try:
            for part in self.replies.pop(0):
                if isinstance(part, str):
                    yield Delta(part)
                elif isinstance(part, Exception):
                    raise part
                else:
                    part()
                    await asyncio.get_running_loop().create_future()  # only a cancel ends this
            yield Delta(finish_reason="stop", stats=STATS)
        finally:
            self.closed += 1


def talk(backend: Backend, script: str, system: str | None = None) -> str:
    out = io.StringIO()
    conversation = OwnConversation(backend, system)
    asyncio.run(chat(conversation, SAMPLING, stdin=io.StringIO(script), stdout=out))
    return out.getvalue()


def test_a_conversation() -> None:
    backend = Backend(["Hel", "lo!"], ["B"])
    shown = talk(backend, "\n\nhi\n  there\n\nmore\n\nexit\n\nnever\n\n", system="Be brief.")
    line = "[prompt 12 tokens (5 cached), reply 34 tokens, first after 0.12 s, 56.8 tokens/s]\n"
    assert shown == f"Hello!\n{line}B\n{line}"
    assert backend.seen == [
        [("system", "Be brief."), ("user", "hi\n  there")],
        [("system", "Be brief."), ("user", "hi\n  there"), ("assistant", "Hello!"),
         ("user", "more")],
    ]


def test_end_begins_anew() -> None:
    backend = Backend(["A"], ["B"])
    shown = talk(backend, "one\n\nend\n\ntwo\n\n", system="S")
    assert "A new conversation." in shown
    assert backend.seen[1] == [("system", "S"), ("user", "two")]


def test_end_of_input_sends_what_was_typed_and_leaves() -> None:
    backend = Backend(["A"])
    assert talk(backend, "no empty line").startswith("A\n")
    assert backend.seen == [[("user", "no empty line")]]
    assert talk(Backend(), "") == talk(Backend(), "\n\n") == ""


def test_errors_are_sentences_and_the_chat_goes_on() -> None:
    backend = Backend(
        [ContextLengthError("Too long.", "Shorten it.")], ["half", ContextLengthError("Broke.")],
        ["fine"])
    shown = talk(backend, "one\n\ntwo\n\nthree\n\n")
    assert shown.startswith("Too long. Shorten it.\nhalf\nBroke.\nfine\n[")
    assert backend.seen[2] == [("user", "three")]


def test_a_message_waits_for_an_engine_that_is_being_started_again() -> None:
    """The event loop stands still while a line is read; the restart needs it."""
    class Restarting(Backend):
        states = ["restarting", "loading", "ready"]

        async def status(self) -> ServiceStatus:
            return ServiceStatus(self.states.pop(0), "m")

    backend = Restarting([EngineNotReadyError("It died.", "Try again.")], ["fine"])
    assert talk(backend, "one\n\n").startswith("It died.\nfine\n[")
    assert backend.seen == [[("user", "one")]] * 2 and not backend.states
    backend = Restarting(
        [EngineNotReadyError("It died.")], [EngineNotReadyError("No restart.")], ["x"])
    backend.states = ["failed"]
    assert talk(backend, "one\n\ntwo\n\n").startswith("It died.\nNo restart.\nx\n")
    assert backend.seen[2] == [("user", "two")]


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        talk(Backend([ZeroDivisionError()]), "hi\n\n")


def test_control_characters_are_not_shown() -> None:
    shown = talk(Backend(["a\x1b]0;owned\x07b\tc\nd\x9b31m 👩‍👧"]), "hi\n\n")
    assert shown.startswith("a]0;ownedb\tc\nd31m 👩‍👧\n")


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_stops_the_reply_only() -> None:
    before = signal.getsignal(signal.SIGINT)
    backend = Backend(["half", interrupt], [interrupt], ["on"])
    shown = talk(backend, "one\n\ntwo\n\nthree\n\n")
    assert shown.startswith("half\nStopped.\n\nStopped.\non\n[")
    assert backend.closed == 3
    assert backend.seen[2] == [("user", "one"), ("assistant", "half"), ("user", "three")]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_at_the_prompt_leaves() -> None:
    class Interrupted(io.StringIO):
        def readline(self, size: int = -1) -> str:
            interrupt()
            return "never\n"

    before = signal.getsignal(signal.SIGINT)
    backend, out = Backend(["A"]), io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(chat(OwnConversation(backend), SAMPLING, stdin=Interrupted(), stdout=out))
    assert (out.getvalue(), backend.seen) == ("", [])
    assert signal.getsignal(signal.SIGINT) is before


def test_cancelling_the_chat_itself_ends_it() -> None:
    async def main() -> None:
        backend = Backend(["x", lambda: task.cancel()])
        task = asyncio.ensure_future(
            chat(OwnConversation(backend), SAMPLING, stdin=io.StringIO("hi\n\n"),
                 stdout=io.StringIO()))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert backend.closed == 1

    asyncio.run(main())


def test_wrong_bytes_are_no_crash(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"caf\xff\n\n")
    backend = Backend(["你好"])
    with open(tmp_path / "in", encoding="utf-8") as given, \
            open(tmp_path / "out", "w", encoding="ascii") as out:
        asyncio.run(chat(OwnConversation(backend), SAMPLING, stdin=given, stdout=out))
    assert backend.seen == [[("user", "caf\ufffd")]]
    assert (tmp_path / "out").read_bytes().startswith(b"??\n")


class Typist(io.StringIO):
    """Types lines, and kills the engine's process before the one that says so."""

    handle: ProcessHandle

    def readline(self, size: int | None = -1) -> str:
        line = super().readline()
        if line == "after the end\n":
            os.kill(self.handle.pid, signal.SIGKILL)
        return line


def test_an_engine_that_dies_while_the_user_types_is_back_by_itself() -> None:
    typist, out = Typist("hello\n\nafter the end\n\nagain\n\n"), io.StringIO()

    def launch() -> ProcessHandle:
        typist.handle = ProcessHandle((sys.executable, "-m", "tests.fake_worker"))
        return typist.handle

    async def main() -> None:
        engine = AsyncEngine(EngineConfig("fake"), launch)
        service = ChatService(
            engine, byte_tokenizer(), LastMessage(), "m")
        await engine.start()
        try:
            await engine.wait_ready()
            sampling = SamplingParams(max_tokens=5)
            await chat(OwnConversation(service), sampling, stdin=typist, stdout=out)
        finally:
            await engine.stop()

    asyncio.run(main())
    lines = [line for line in out.getvalue().splitlines() if not line.startswith("[")]
    # The message may be ahead of the notice of the death, and be lost; not so the one after it.
    assert (lines[0], lines[-1]) == ("hello", "again") and lines[1].startswith("The engine ")


def test_closed_input_and_broken_output(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdin", None)
    asyncio.run(chat(OwnConversation(Backend()), SAMPLING, stdout=io.StringIO()))
    backend = Backend(["A", "B"])
    with pytest.raises(UserError, match="cannot be written out: Broken pipe."):
        asyncio.run(chat(OwnConversation(backend), SAMPLING, stdin=io.StringIO("hi\n\n"),
                         stdout=Broken()))
    assert backend.closed == 1


SESSION = """
import asyncio, sys
from backend.console import chat
from backend.conversation import OwnConversation
from tests.unit.test_console import SAMPLING, Backend
try:
    asyncio.run(chat(OwnConversation(Backend(["Hi ", print, "never"], ["Again"])), SAMPLING))
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_at_a_real_terminal() -> None:
    """Prompt, Ctrl-C in a reply, a second message, Ctrl-C at the prompt; as keys, not as calls."""
    root = str(Path(__file__).parents[2])
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            os.execve(sys.executable, [sys.executable, "-c", SESSION],
                      {**os.environ, "PYTHONPATH": root, "TERM": "xterm"})
        finally:
            os._exit(127)
    shown = b""

    def wait_for(text: bytes) -> None:
        nonlocal shown
        while text not in shown:
            assert select.select([terminal], [], [], 60)[0], shown
            shown += os.read(terminal, 4096)
        shown = shown.split(text, 1)[1]

    wait_for(b"double enter to end input >>> ")
    os.write(terminal, "你好\r\r".encode())
    wait_for(b"Hi \r\n")  # `print` ends the line: the backend waits from here on
    os.write(terminal, b"\x03")
    wait_for(b"Stopped.")
    wait_for(b"double enter to end input >>> ")
    os.write(terminal, b"more\r\r")
    wait_for(b"Again\r\n\x1b[2m[prompt 12 tokens")
    wait_for(b"double enter to end input >>> ")

    def ended() -> bool:
        while select.select([terminal], [], [], 10)[0]:
            try:
                os.read(terminal, 4096)
            except OSError:  # nobody is at its other end
                return True
        return False

    os.write(terminal, b"\x03")
    while not ended():  # Python's input() misses a signal in the instant before it begins to wait
        os.write(terminal, b"\x03")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    os.close(terminal)
