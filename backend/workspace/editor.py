"""Changes to a model's settings: checked, shown as a diff, written at once, taken back.

Beside NAME, the folder .NAME.undo keeps what the file was before each of the last twenty times that
it was saved.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.errors import UserError
from backend.workspace.config_ini import ConfigIni
from backend.workspace.keys import Key, known_key
from backend.workspace.settings import SettingsFile, model_s_own

UNDOS = 20


@dataclass(frozen=True)
class Draft:
    """A settings' file with changes that may be made: every value is allowed.

    Attributes:
        before: its text, empty where there is no file yet.
        ini: the file as it would be.
    """

    before: str
    ini: ConfigIni

    @property
    def after(self) -> str:
        return self.ini.text if self.changed else self.before

    @property
    def changed(self) -> bool:
        """A file that does not exist is not made to say nothing."""
        return self.ini.text != self.before and bool(self.before or self.ini.values)

    @property
    def diff(self) -> str:
        """As `diff -u` tells it; empty if nothing changes."""
        return unified_diff(self.before, self.after, self.ini.path.name)


def unified_diff(before: str, after: str, name: str) -> str:
    """What changes between two texts of the file `name`."""
    old, new = before.splitlines(), after.splitlines()
    return "\n".join(difflib.unified_diff(old, new, name, f"{name} (new)", lineterm="", n=2))


def draft(file: SettingsFile, changes: Mapping[str, str]) -> Draft:
    """The file with new values; an empty one takes the key out, so that its default counts.

    Raises:
        UserError: a key is not known or locked, a value is not allowed, or the engine cannot do it.
    """
    ini = file.read()
    before = ini.text if file.path.exists() else ""
    for name, text in changes.items():
        key = known_key(name, file.keys)
        if key.locked and (not text or key.parse(text) != key.parse(file.locked[name])):
            raise UserError(
                f"{name} cannot be changed: the weights decide it.",
                "Convert the model again with --tp." if name == "tensor_para_size" else
                "It is an attribute of the model.",
                field=name,
            )
        if text:
            ini.set(name, text)
        else:
            ini.remove(name)
    file.options(file.check(ini), {})
    return Draft(before, ini)


def changes_of(file: SettingsFile, ini: ConfigIni, form: Mapping[str, Any]) -> dict[str, str]:
    """What a form's values change, by key; None and "" stand for a key's absence.

    A value that means what is there already, or what counts without the key, changes nothing: the
    file keeps its own spelling.
    """
    values, changes = {**model_s_own(file.model), **file.check(ini)}, {}
    for name, value in form.items():
        key = known_key(name, file.keys)
        text = spelled(key, value)
        now = values.get(name, "" if key.default is None else key.default)
        try:
            same = (key.parse(text) if text else "") == now
        except UserError:
            same = False
        if not same and (text or name in ini.values):
            changes[name] = text
    return changes


def spelled(key: Key, value: Any) -> str:
    """A form's value as the file has it. What is of another type will be refused by its text."""
    if value is None or value == "":
        return ""
    if isinstance(value, bool) and (key.type is bool or key.type is int):
        return key.show(value)
    if key.type is int and isinstance(value, float) and value.is_integer():
        return str(int(value))
    if key.type is float and isinstance(value, int):
        return str(float(value))
    return str(value).strip()


def digest(text: str) -> str:
    """Tells a file's texts apart, so that nobody overwrites what he has not seen."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save(file: SettingsFile, changes: Mapping[str, str], seen: str | None = None) -> Draft:
    """Write new values: all of them, or none. `undo` takes it back.

    Args:
        seen: digest of the text that the changes were made to; None writes to whatever is there.

    Raises:
        UserError: as `draft`; the file has changed since; or it cannot be written.
    """
    with _locked(file.path):
        wanted = draft(file, changes)
        if seen is not None and digest(wanted.before) != seen:
            raise UserError(
                f"{file.name} was changed by somebody else in the meantime.",
                "Load it again, and make your changes to what it says now.",
            )
        if not wanted.changed:
            return wanted
        snapshot = _push(file.path, wanted.before, wanted.after)
        try:
            wanted.ini.write()
        except UserError:
            snapshot.unlink(missing_ok=True)
            raise
        return wanted


def undos(file: SettingsFile) -> int:
    """How many saves can be taken back."""
    return len(_snapshots(file.path))


def undo(file: SettingsFile) -> str:
    """Take the last save back, to the byte; a file that it made is deleted. Returns the diff.

    Raises:
        UserError: nothing was saved, the file was edited by other means since, or it cannot be
            written.
    """
    with _locked(file.path):
        now = file.read().text if file.path.exists() else ""
        snapshots = _snapshots(file.path)
        while snapshots and _text(snapshots[-1]) == now:  # of a save that was cut off
            snapshots.pop().unlink()
        if not snapshots:
            raise UserError(f"There is no change to {file.name} left to take back.")
        last = snapshots[-1]
        if last.name.partition("-")[2] != digest(now):
            raise UserError(
                f"{file.name} was edited by other means since it was saved here, which would be "
                "lost.",
                "Save a change here first; that can be taken back.",
            )
        before = _text(last)
        if before:
            file.parse(before).write()
        else:
            file.path.unlink(missing_ok=True)
        last.unlink()
        return unified_diff(now, before, file.path.name)


def _folder(path: Path) -> Path:
    return path.with_name(f".{path.name}.undo")


def _snapshots(path: Path) -> list[Path]:
    """What the file was before each save, the earliest first: NUMBER-DIGEST of what it became."""
    return sorted(found for found in _folder(path).glob("*-*") if found.is_file())


def _text(snapshot: Path) -> str:
    return snapshot.read_bytes().decode()


def _push(path: Path, before: str, after: str) -> Path:
    snapshots = _snapshots(path)
    number = int(snapshots[-1].name.partition("-")[0]) + 1 if snapshots else 1
    made = _folder(path) / f"{number:06}-{digest(after)}"
    try:
        made.write_bytes(before.encode())
        for old in snapshots[: max(len(snapshots) + 1 - UNDOS, 0)]:
            old.unlink()
    except OSError as error:
        raise UserError(f"{made} cannot be written: {error.strerror}.") from error
    return made


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Be the only one who changes the file; waits for another, who takes milliseconds."""
    try:
        _folder(path).mkdir(parents=True, exist_ok=True)
        lock = os.open(_folder(path) / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise UserError(f"{path} cannot be changed: {error.strerror}.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
