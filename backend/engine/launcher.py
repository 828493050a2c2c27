"""Two ways to start an engine: a process of its own, or a thread of this one. Both talk over the
same kind of pipe, in the same messages."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from backend.config import EngineConfig

log = logging.getLogger(__name__)
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


class ThreadHandle:
    """An engine in a thread of this process; it cannot be killed, only asked to end."""

    def __init__(self, build: Callable[[EngineConfig], object] | None = None) -> None:
        self.connection, theirs = Pipe()
        self.pid = os.getpid()
        self._thread = threading.Thread(
            target=self._run, args=(theirs, build), name="engine", daemon=True
        )
        self._thread.start()

    @staticmethod
    def _run(connection: Connection, build: Callable[[EngineConfig], object] | None) -> None:
        from backend.engine import messages, worker

        try:
            with connection:
                start = messages.decode_command(connection.recv_bytes())
                assert isinstance(start, messages.Start)
                worker.serve(connection, start, build or worker.build_engine)  # type: ignore[arg-type]
        except (EOFError, OSError):
            pass  # the other end closed: nobody needs this engine any more
        except Exception:
            log.exception("The engine thread died")

    def kill(self) -> None:
        self.connection.close()

    def wait(self, timeout: float | None = None) -> bool:
        self._thread.join(timeout)
        return not self._thread.is_alive()
