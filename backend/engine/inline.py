"""An engine in a thread of this process: for `--inline`, tests, and use from Python."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from backend.config import EngineConfig
from backend.engine import messages, worker
from backend.engine.engine import Engine

log = logging.getLogger(__name__)


class ThreadHandle:
    """A started engine (see `launcher.Handle`) that cannot be killed, only asked to end.

    Args:
        build: makes the engine; tests bring one over a fake model.
    """

    def __init__(self, build: Callable[[EngineConfig], Engine] = worker.build_engine) -> None:
        self.connection, theirs = Pipe()
        self.pid = os.getpid()
        self._thread = threading.Thread(
            target=self._run, args=(theirs, build), name="engine", daemon=True
        )
        self._thread.start()

    @staticmethod
    def _run(connection: Connection, build: Callable[[EngineConfig], Engine]) -> None:
        try:
            with connection:
                start = messages.decode_command(connection.recv_bytes())
                assert isinstance(start, messages.Start)
                worker.serve(connection, start, build)
        except (EOFError, OSError):
            pass  # the other end closed: nobody needs this engine any more
        except Exception:  # the thread's end: the closed connection tells the other side
            log.exception("The engine thread died")

    def kill(self) -> None:
        self.connection.close()

    def wait(self, timeout: float | None = None) -> bool:
        self._thread.join(timeout)
        return not self._thread.is_alive()
