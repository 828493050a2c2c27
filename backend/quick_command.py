"""Commands that take seconds, as processes of their own, so that what they load is given back.

    asker = QuickCommands()
    plan = (await asker.ask(["lite", "auto_awq", folder, "--plan"]))["plan"]
"""

from __future__ import annotations

import asyncio
import json
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from backend.errors import UserError
from backend.jobs import APP

AT_ONCE = 2  # each may import PyTorch; others wait
LIMIT_S = 120.0


class QuickCommands:
    """Runs commands of app.py that take `--progress json`.

    Args:
        command: what `argv` is appended to.
        limit_s: after so many seconds a command is ended.
    """

    def __init__(self, command: Sequence[str] = APP, limit_s: float = LIMIT_S) -> None:
        self._command, self._limit_s = tuple(command), limit_s
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def ask(self, argv: Sequence[str]) -> dict[str, Any]:
        """The fields of the command's "result" event.

        Raises:
            UserError: the command's own refusal; or it took too long.
            RuntimeError: it ended without a word.
        """
        async with self._turns:
            child = await asyncio.create_subprocess_exec(
                *self._command, *argv, "--progress", "json", stdin=DEVNULL, stdout=PIPE,
                stderr=DEVNULL)
            try:
                output, _ = await asyncio.wait_for(child.communicate(), self._limit_s)
            except TimeoutError:
                raise UserError(f"This was not answered within {self._limit_s:.0f} s.",
                                "The machine is busy; try again.") from None
            finally:  # cancelled, too
                with suppress(ProcessLookupError):
                    child.kill()
                await child.wait()
        for line in reversed(output.decode("utf-8", "replace").splitlines()):
            event = json.loads(line) if line.startswith('{"event"') else {}
            if event.get("event") == "result":
                return dict(event)
            if event.get("event") == "error":
                raise UserError(event["message"], event.get("hint", ""), field=event.get("field"))
        raise RuntimeError(f"{' '.join(argv[:2])} ended with {child.returncode} without a word")
