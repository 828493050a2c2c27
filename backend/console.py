"""Chat in the terminal: type, press Enter twice, read."""

from __future__ import annotations

import asyncio
import io
import re
import signal
import sys
from contextlib import aclosing
from typing import TextIO

from backend.chat import ChatBackend, Message, ReplyStats
from backend.config import SamplingParams
from backend.errors import EngineNotReadyError, UserError

PROMPT = "\ndouble enter to end input >>> "
INTRODUCTION = (
    "Enter twice sends, Ctrl-C stops a reply. end begins a new conversation, exit leaves."
)
# Control characters could move the cursor, retitle the window or worse.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


async def chat(
    backend: ChatBackend,
    sampling: SamplingParams,
    *,
    system: str | None = None,
    stdin: TextIO | None = None,
    stdout: TextIO | None = None,
) -> None:
    """Talk until the user leaves by `exit` or the end of the input.

    Must be called in the main thread, where Ctrl-C arrives.

    Raises:
        KeyboardInterrupt: Ctrl-C at the prompt.
        UserError: the output cannot be written to.
    """
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        given = stdin or sys.stdin or io.StringIO()  # a closed input is one that ends at once
        console = _Console(backend, sampling, system, given, stdout or sys.stdout)
        await console.run()
    finally:
        signal.signal(signal.SIGINT, before)


class _Console:
    def __init__(
        self, backend: ChatBackend, sampling: SamplingParams, system: str | None,
        stdin: TextIO, stdout: TextIO,
    ) -> None:
        self.backend, self.sampling = backend, sampling
        self.stdin, self.stdout = stdin, stdout
        self.opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.opening)
        self.at_terminal = stdin.isatty() and stdout.isatty()
        for stream in (stdin, stdout):  # what the terminal cannot show or said wrongly is no crash
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        if self.at_terminal and stdin is sys.stdin:
            import readline  # noqa: F401  gives input() arrow keys and a history

    async def run(self) -> None:
        if self.at_terminal:
            self.write(INTRODUCTION + "\n")
        while (text := self.read()) is not None and text.strip() != "exit":
            if text.strip() == "end":
                self.messages = list(self.opening)
                self.note("A new conversation.")
            else:
                await self.turn(text)

    def read(self) -> str | None:
        """A message: lines up to an empty one. None at the end of the input.

        Blocks the event loop, on purpose: only so does Ctrl-C end the wait. What the loop should
        do meanwhile, starting a dead engine again, is waited for in `reply`.
        """
        lines: list[str] = []
        while True:
            line = self.read_line(PROMPT if not lines else "")
            if line is None or (lines and not line.strip()):
                break
            if line.strip():
                lines.append(line)
        return "\n".join(lines) if lines else None

    def read_line(self, prompt: str) -> str | None:
        if self.at_terminal and self.stdin is sys.stdin:
            try:
                return input(prompt)
            except EOFError:
                return None
        if self.at_terminal:
            self.write(prompt)
        line = self.stdin.readline()
        return line.rstrip("\r\n") if line else None

    async def turn(self, text: str) -> None:
        """One message and its reply, which Ctrl-C stops. What failed is not remembered."""
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        loop = asyncio.get_running_loop()
        reply = asyncio.ensure_future(self.reply(pieces))
        loop.add_signal_handler(signal.SIGINT, reply.cancel)
        try:
            stats = await reply
        except UserError as error:
            self.note(str(error), begin="\n" if pieces else "")
            pieces.clear()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # not by Ctrl-C: all of this shall end
                raise
            self.note("Stopped.", begin="\n")
        else:
            self.note(stats, begin="\n")
        finally:
            loop.remove_signal_handler(signal.SIGINT)  # back to KeyboardInterrupt
        if pieces:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})
        else:
            self.messages.pop()

    async def reply(self, pieces: list[str]) -> str:
        """Show the reply as it comes, and gather it in `pieces`; returns the line below it."""
        try:
            return await self.receive(pieces)
        except EngineNotReadyError as error:
            self.note(error.message)
            while (await self.backend.status()).state in ("loading", "restarting"):
                await asyncio.sleep(0.1)
            return await self.receive(pieces)

    async def receive(self, pieces: list[str]) -> str:
        """One attempt at `reply`."""
        line = ""
        async with aclosing(self.backend.stream(self.messages, self.sampling)) as deltas:
            async for delta in deltas:
                if delta.text:
                    pieces.append(delta.text)
                    self.write(_CONTROL.sub("", delta.text))
                if delta.stats is not None:
                    line = describe(delta.stats)
                    if delta.finish_reason == "length":
                        line += ", cut off at the length limit"
        return line

    def note(self, text: str, begin: str = "") -> None:
        """A line that is not the model's, dim where the terminal can."""
        text = _CONTROL.sub("", text)
        self.write(begin + (f"\x1b[2m{text}\x1b[0m\n" if self.at_terminal else f"{text}\n"))

    def write(self, text: str) -> None:
        try:
            self.stdout.write(text)
            self.stdout.flush()
        except OSError as error:  # a full disk, or a reader such as `head` that has gone
            raise UserError(f"The chat cannot be written out: {error.strerror}.") from error


def describe(stats: ReplyStats) -> str:
    """Counts and times of a reply, in one line."""
    cached = f" ({stats.cached_tokens} cached)" if stats.cached_tokens else ""
    speed = f", {stats.tokens_per_s:.1f} tokens/s" if stats.tokens_per_s else ""
    return (f"[prompt {stats.prompt_tokens} tokens{cached}, reply {stats.completion_tokens} "
            f"tokens, first after {stats.ttft_s:.2f} s{speed}]")
