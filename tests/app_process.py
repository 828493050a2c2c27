"""`python app.py ...` as a real process, for tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
BOUND_S = 120.0  # for whatever a busy machine may take long to do


class AppProcess:
    """A running command line, in a session of its own, as in a terminal of its own.

    Args:
        home: stands in for the user's home directory.
        argv: of app.py.
        cwd: its current folder.
    """

    def __init__(self, home: Path, *argv: str | Path, cwd: Path = ROOT) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "app.py"), *map(str, argv)], cwd=cwd,
            env=environment(home),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True)
        self.pid = self.process.pid
        self._too_long = threading.Timer(BOUND_S, self.process.kill)  # nobody waits for ever
        self._too_long.daemon = True
        self._too_long.start()
        self.url = ""

    def announcement(self) -> str:
        """What it prints when it can answer; `url` is known from then on."""
        assert self.process.stdout is not None
        lines: list[str] = []
        while not lines or "Tunnel" not in lines[-1]:
            line = self.process.stdout.readline()
            assert line, self.process.communicate()[1]
            lines.append(line)
        self._too_long.cancel()
        text = "".join(lines)
        found = re.search(r"(?:Page|API) +(http://127\.0\.0\.1:\d+)", text)
        assert found, text
        self.url = found[1]
        return text

    def family(self) -> list[psutil.Process]:
        """All processes that it has started, at least one."""
        found: list[psutil.Process] = []

        def started() -> bool:
            assert self.process.poll() is None, self.process.communicate()[1]
            found[:] = psutil.Process(self.pid).children(recursive=True)
            return bool(found)

        until(started, "it starts no process")
        return found

    def engine(self) -> psutil.Process:
        """The engine's process."""
        return next(p for p in self.family() if "backend.engine.worker" in p.cmdline())

    def wait(self) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) when it has ended."""
        out, err = self.process.communicate(timeout=BOUND_S)
        self._too_long.cancel()
        return self.process.returncode, out, err

    def interrupt(self) -> None:
        """Ctrl-C, as a terminal sends it."""
        os.killpg(self.pid, signal.SIGINT)

    def kill(self) -> None:
        """End it, if it is still there."""
        if self.process.poll() is None:
            self.process.kill()
        self.wait()


def environment(home: Path) -> dict[str, str]:
    """The environment with another home, and one thread for torch."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    return kept | {"HOME": str(home), "OMP_NUM_THREADS": "1"}


def until(condition: Callable[[], bool], what: str, bound_s: float = BOUND_S) -> None:
    """Wait for something that happens in another process.

    Args:
        what: the complaint if it does not come about within `bound_s` seconds.
    """
    deadline = time.monotonic() + bound_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def assert_gone(processes: list[psutil.Process]) -> None:
    """Insist that all of them end."""
    assert processes
    until(lambda: all(map(_ended, processes)), f"still there: {processes}")


def _ended(process: psutil.Process) -> bool:
    try:  # orphans of a container without an init stay zombies
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
