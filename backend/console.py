"""Chat in the terminal: type, press Enter twice, read."""

from __future__ import annotations

import asyncio
import io
import re
import signal
import sys
from contextlib import aclosing
from typing import TextIO

from backend.chat import ReplyStats
from backend.config import SamplingParams
from backend.conversation import Conversation
from backend.errors import EngineNotReadyError, UserError

PROMPT = "\ndouble enter to end input >>> "
INTRODUCTION = (
    "Enter twice sends, Ctrl-C stops a reply. end begins a new conversation, exit leaves."
)
# Control characters could move the cursor, retitle the window or worse.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


async def chat(
    conversation: Conversation,
    sampling: SamplingParams,
    *,
    stdin: TextIO | None = None,
    stdout: TextIO | None = None,
) -> None:
    """Talk until the user leaves by `exit` or the end of the input.

    Must be called in the main thread, where Ctrl-C arrives.

    Raises:
        KeyboardInterrupt: Ctrl-C at the prompt.
        UserError: the conversation cannot begin, or the output cannot be written to.
    """
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        given = stdin or sys.stdin or io.StringIO()  # a closed input is one that ends at once
        console = _Console(conversation, sampling, given, stdout or sys.stdout)
        await console.run()
    finally:
        signal.signal(signal.SIGINT, before)


class _Console:
    def __init__(
        self, conversation: Conversation, sampling: SamplingParams,
        stdin: TextIO, stdout: TextIO,
    ) -> None:
        self.conversation, self.sampling = conversation, sampling
        self.stdin, self.stdout = stdin, stdout
        self.written = False  # a part of the reply that is coming
        self.at_terminal = stdin.isatty() and stdout.isatty()
        for stream in (stdin, stdout):  # what the terminal cannot show or said wrongly is no crash
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        if self.at_terminal and stdin is sys.stdin:
            import readline  # noqa: F401  gives input() arrow keys and a history

    async def run(self) -> None:
        if self.at_terminal:
            self.write(INTRODUCTION + "\n")
        if what := await self.conversation.begin():
            self.note(what)
        while (text := self.read()) is not None and text.strip() != "exit":
            if text.strip() == "end":
                await self.end()
            else:
                await self.turn(text)
        if what := self.conversation.farewell():
            self.note(what)

    async def end(self) -> None:
        try:
            await self.conversation.end()
        except UserError as error:
            self.note(str(error))
        else:
            self.note("A new conversation.")

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
        """One message and its reply, which Ctrl-C stops."""
        loop = asyncio.get_running_loop()
        reply = asyncio.ensure_future(self.reply(text))
        loop.add_signal_handler(signal.SIGINT, reply.cancel)
        self.written = False
        try:
            stats = await reply
        except UserError as error:
            self.note(str(error), begin="\n" if self.written else "")
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # not by Ctrl-C: all of this shall end
                raise
            self.note("Stopped.", begin="\n")
        else:
            self.note(stats, begin="\n")
        finally:
            loop.remove_signal_handler(signal.SIGINT)  # back to KeyboardInterrupt

    async def reply(self, text: str) -> str:
        """Show the reply as it comes; returns the line below it."""
        try:
            return await self.receive(text)
        except EngineNotReadyError as error:
            self.note(error.message)
            while (await self.conversation.backend.status()).state in ("loading", "restarting"):
                await asyncio.sleep(0.1)
            return await self.receive(text)

    async def receive(self, text: str) -> str:
        """One attempt at `reply`."""
        line = ""
        async with aclosing(self.conversation.say(text, self.sampling)) as deltas:
            async for delta in deltas:
                if delta.text:
                    self.written = True
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
    # A server's session does not tell how long its prompt is.
    prompt = f"prompt {stats.prompt_tokens} tokens{cached}, " if stats.prompt_tokens else ""
    return (f"[{prompt}reply {stats.completion_tokens} tokens, first after "
            f"{stats.ttft_s:.2f} s{speed}]")
