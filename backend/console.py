"""Chat in the terminal: two Enters send, `exit` quits, `end` begins anew, Ctrl-C stops a reply."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from typing import TextIO

from rich.console import Console

from backend.chat import ChatBackend, Message, ReplyStats
from backend.config import SamplingParams
from backend.errors import UserError

GREETING = "Two Enters send, end begins a new conversation, exit quits, Ctrl-C stops a reply."
PROMPT = "you> "


async def chat(
    backend: ChatBackend,
    sampling: SamplingParams,
    *,
    system: str | None = None,
    stdin: TextIO = sys.stdin,
    stdout: TextIO = sys.stdout,
) -> None:
    """Converse until `exit` or the end of the input.

    Errors of a turn are told in a sentence, and the conversation goes on without that turn.
    """
    # `highlight` would colour numbers in replies.
    console = Console(file=stdout, highlight=False, markup=False, emoji=False, soft_wrap=True)
    first: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(first)
    console.print(GREETING, style="dim")
    while True:
        text = await _read_message(stdin, console)
        if text is None or text == "exit":
            return
        if text == "end":
            messages = list(first)
            console.print("A new conversation.", style="dim")
            continue
        if not text:
            continue
        turn: Message = {"role": "user", "content": text}
        try:
            reply = await _answer(backend, [*messages, turn], sampling, console)
        except UserError as error:
            console.print(f"\n{error}", style="yellow")
            continue
        if reply:
            messages += [turn, {"role": "assistant", "content": reply}]


async def _read_message(stdin: TextIO, console: Console) -> str | None:
    """Lines up to an empty one, or a command alone on the first; None at the end of the input."""
    console.print(PROMPT, end="", style="bold")
    lines: list[str] = []
    while True:
        # Not in a thread: nothing else wants the loop now, and Ctrl-C must end the reading.
        line = stdin.readline()
        if not line:
            return "\n".join(lines).strip() or None
        line = line.rstrip("\r\n")
        if not lines and line.strip() in ("exit", "end"):
            return line.strip()
        if not line:
            return "\n".join(lines).strip()
        lines.append(line)


async def _answer(
    backend: ChatBackend, messages: list[Message], sampling: SamplingParams, console: Console
) -> str:
    """Print a reply as it comes; returns what of it came before the end or Ctrl-C."""
    pieces: list[str] = []

    async def receive() -> ReplyStats | None:
        stats = None
        async with aclosing(backend.stream(messages, sampling)) as deltas:  # type: ignore[type-var]
            async for delta in deltas:
                if delta.text:
                    pieces.append(delta.text)
                    console.file.write(delta.text)
                    console.file.flush()
                stats = delta.stats or stats
        return stats

    task = asyncio.create_task(receive())
    with _interrupt(task):
        try:
            stats = await task
        except asyncio.CancelledError:
            if asyncio.current_task() and asyncio.current_task().cancelling():  # type: ignore
                raise  # it was not Ctrl-C that cancelled: somebody ends the whole chat
            console.print("\n(stopped)", style="dim")
            return "".join(pieces)
    console.print()
    if stats is not None:
        console.print(
            f"[{stats.prompt_tokens} + {stats.completion_tokens} tokens, first after "
            f"{stats.ttft_s:.2f} s, {stats.tokens_per_s:.1f} tokens/s]",
            style="dim",
        )
    return "".join(pieces)


@contextmanager
def _interrupt(task: asyncio.Task[ReplyStats | None]) -> Iterator[None]:
    """While a reply runs, Ctrl-C cancels it and nothing else."""
    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(signal.SIGINT, task.cancel)
    except (NotImplementedError, RuntimeError, ValueError):  # not the main thread, or Windows
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
