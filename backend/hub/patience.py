"""How long to go on with a hub that fails: attempts, pauses, and when to give up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from backend.hub.connection import OFFLINE_HINT, Passing
from backend.hub.errors import DownloadStopped, OfflineError

Result = TypeVar("Result")
LONGEST_PAUSE_S = 30.0


@dataclass
class Patience:
    """Attempts that fail in a row, and the pauses between them: 1, 2, 4, ... seconds.

    Args:
        cancel: ends pauses too.
        attempts: until it gives up.
        pause: waits so many seconds; True if it was cancelled meanwhile. Tests pass their own.
    """

    cancel: threading.Event = field(default_factory=threading.Event)
    attempts: int = 5
    pause: Callable[[float], bool] | None = None

    def check(self) -> None:
        """Raises DownloadStopped if it is cancelled."""
        if self.cancel.is_set():
            raise DownloadStopped("The download was stopped.",
                                  "What is fetched is kept: the same command goes on from there.")

    def run(self, host: str, action: Callable[[], Result],
            gained: Callable[[], bool] = lambda: False) -> Result:
        """Do it again and again until it succeeds.

        Args:
            gained: whether the last attempt, though it failed, brought it forward; those do not
                count.

        Raises:
            OfflineError: as many attempts as allowed failed in a row.
            DownloadStopped: it was cancelled.
        """
        failures = 0
        while True:
            self.check()
            try:
                return action()
            except Passing as error:
                failures = 1 if gained() else failures + 1
                if failures >= self.attempts:
                    raise OfflineError(f"{host} cannot be used now: {error.reason}.",
                                       OFFLINE_HINT) from None
                wait = self.cancel.wait if self.pause is None else self.pause
                wait(max(error.wait_s, min(2.0 ** (failures - 1), LONGEST_PAUSE_S)))
