"""A folder that is there whole or not at all: written as NAME.partial, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from backend.errors import UserError

MARK = ".unfinished"  # in NAME.partial: that it is one of ours, and may be deleted
REPLACED = ".replaced"  # in NAME.partial, for a moment: the folder that it takes the place of
RESERVE = 1.05  # of the disk space: headers, tokenizer, a file system's own needs


class NewFolder:
    """NAME.partial, empty, beside a target NAME; in a `with` it gets that name, or is deleted.

    What a killed run left there is deleted, too.

    Args:
        target: NAME.
        source: which the target may neither be, nor hold, nor lie in.
        needed: bytes that will be written.
        replaceable: whether an existing folder is one that may be replaced; None: never.
        field: the parameter that names the target.

    Attributes:
        target: NAME, absolute.
        path: NAME.partial.

    Raises:
        UserError: the target exists and is not replaceable, the disk has too little room, or
            nothing can be written there.
    """

    def __init__(
        self,
        target: str | Path,
        source: Path,
        needed: int,
        replaceable: Callable[[Path], bool] | None = None,
        field: str = "dst_path",
    ) -> None:
        self.target = Path(os.path.abspath(target))
        self.path = self.target.with_name(self.target.name + ".partial")
        self._replaceable = replaceable
        self._field = field
        own, there = source.resolve(), self.target.resolve()
        if there == own or own in there.parents or there in own.parents:
            raise UserError(
                f"The result cannot go to {target}: the model itself is there.",
                "Choose another folder.",
                field=field,
            )
        try:
            if os.path.lexists(self.path):
                if not (self.path / MARK).is_file():
                    raise UserError(
                        f"{self.path}, where the result would be written, exists.",
                        "Move it away, or choose another folder.",
                        field=field,
                    )
                # Killed between the two renames: nothing is lost.
                if (self.path / REPLACED).is_dir() and not os.path.lexists(self.target):
                    os.rename(self.path / REPLACED, self.target)
                shutil.rmtree(self.path)
            self._check_target()
            self.path.mkdir(parents=True)
            (self.path / MARK).touch()
        except OSError as error:
            raise self._unwritable(error) from error
        free = shutil.disk_usage(self.path).free
        if free < needed * RESERVE:
            shutil.rmtree(self.path)
            raise UserError(
                f"The result needs {needed * RESERVE / 1e9:.2f} GB, and {self.target.parent} has "
                f"{free / 1e9:.2f} GB left.",
                "Make room, or choose a folder on another disk.",
                field=field,
            )

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if kind is None:
            self._publish()
            return
        shutil.rmtree(self.path, ignore_errors=True)
        if isinstance(error, OSError):
            raise self._unwritable(error) from error

    def _check_target(self) -> None:
        if not os.path.lexists(self.target):
            return
        if self._replaceable is None:
            raise UserError(
                f"{self.target} exists already.",
                "Choose another folder, or give --overwrite to replace it.",
                field=self._field,
            )
        is_empty = self.target.is_dir() and not os.listdir(self.target)
        if not is_empty and not self._replaceable(self.target):
            raise UserError(
                f"{self.target} is nothing that this command has made, so it is not replaced.",
                "Move it away, or choose another folder.",
                field=self._field,
            )

    def _publish(self) -> None:
        """Only now is a folder in its place deleted."""
        self._check_target()  # minutes have passed
        try:
            for path in self.path.rglob("*"):
                _sync(path)
            if os.path.lexists(self.target):
                os.rename(self.target, self.path / REPLACED)
            os.rename(self.path, self.target)
            _sync(self.target.parent)
            shutil.rmtree(self.target / REPLACED, ignore_errors=True)
            (self.target / MARK).unlink()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{error.filename or self.path} cannot be written: {error.strerror or error}.",
            "Choose another folder.",
            field=self._field,
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
