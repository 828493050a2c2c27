"""A started engine, and the usual way to start one: as a process of its own, over a pipe.

`backend.engine.inline` has the other way, over the same kind of pipe, in the same messages.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

PROJECT = Path(__file__).resolve().parents[2]
WORKER = (sys.executable, "-m", "backend.engine.worker")


class Handle(Protocol):
    """A started engine."""

    connection: Connection
    pid: int

    def kill(self) -> None:
        """End it now, if it is still there, and wait until it is gone."""

    def wait(self, timeout: float) -> bool:
        """Wait for its end; False if it has not come after `timeout` seconds."""


class ProcessHandle:
    """An engine in a child process, which ends when our end of the pipe closes."""

    def __init__(self, command: Sequence[str] = WORKER) -> None:
        self.connection, theirs = Pipe()
        fd = theirs.fileno()
        self._process = subprocess.Popen(
            [*command, str(fd)],
            pass_fds=[fd],
            stdin=subprocess.DEVNULL,
            cwd=PROJECT,
            process_group=0,  # a terminal's Ctrl-C is not for the engine
        )
        theirs.close()
        self.pid = self._process.pid

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def wait(self, timeout: float | None = None) -> bool:
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True
