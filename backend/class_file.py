"""What a host has set for a class, kept when the server ends: its limits, and whether it is paused.

A class is the user's on this machine at the port that was asked for, so that the same command line
finds it again. A pause is forgotten after half a day: the next class should not meet closed doors
that somebody forgot to open the evening before.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from backend.classroom import Classroom, StudentLimits
from backend.config import validate
from backend.data_dir import data_dir
from backend.errors import UserError

PAUSE_SECONDS = 12 * 3600
MAX_BYTES = 4096

logger = logging.getLogger(__name__)


class ClassFile:
    """Where a class is kept.

    Args:
        clock: seconds since 1970.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path, self._clock = path, clock

    def open(self) -> Classroom:
        """The class as its host left it, and from now on kept; what cannot be read is as new."""
        classroom = Classroom(has_hosts=True, keep=self._write)
        try:
            kept = json.loads(self._read())
            limits = StudentLimits(**kept["limits"])
            validate(limits)
            paused = kept["paused"] is True and 0 <= self._clock() - kept["written"] < PAUSE_SECONDS
        except FileNotFoundError:
            return classroom
        except (OSError, ValueError, KeyError, TypeError, UserError) as error:
            logger.warning("The class's limits in %s cannot be read: %s", self.path, error)
            return classroom
        classroom.student_limits, classroom.paused = limits, paused
        if paused:
            logger.warning("The class is paused, as it was when the server ended.")
        if limits != StudentLimits():
            logger.warning(
                "The class's limits are those of before: %d replies at a time, %s tokens each.",
                limits.max_replies, limits.max_tokens or "any number of")
        return classroom

    def _read(self) -> str:
        with open(self.path, encoding="utf-8") as file:
            return file.read(MAX_BYTES)

    def _write(self, classroom: Classroom) -> None:
        """Replace the file: at every moment it is the old one or the new one. A class goes on
        without it, too."""
        limits = classroom.student_limits
        draft = self.path.with_suffix(".new")
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(draft, "w", encoding="utf-8") as file:
                json.dump({
                    "written": self._clock(), "paused": classroom.paused,
                    "limits": {"max_replies": limits.max_replies, "max_tokens": limits.max_tokens},
                }, file)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self.path)
        except OSError as error:
            logger.warning("The class's limits are not kept beyond this run: %s", error)
            with suppress(OSError):
                draft.unlink()


def open_class(port: int) -> Classroom:
    """The class of this user, machine and port.

    Args:
        port: as it was asked for; if that is taken, the server may get another.
    """
    try:
        folder = data_dir() / "classes"
    except UserError as error:
        logger.warning("The class's limits are not kept beyond this run. %s", error)
        return Classroom(has_hosts=True)
    return ClassFile(folder / f"{platform.node()}-{port}.json").open()
