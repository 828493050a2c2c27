"""A folder that is there whole or not at all, whenever the process that writes it is killed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from backend.errors import UserError
from backend.workspace import new_folder
from backend.workspace.new_folder import MARK, NewFolder


class Killed(BaseException):
    """The process is gone: nothing of it runs any more."""


def write(folder: Path, text: str, overwrite: bool = True) -> None:
    replaceable = (lambda path: (path / "file").exists()) if overwrite else None
    with NewFolder(folder, folder.parent / "source", 1, replaceable) as partial:
        (partial / "file").write_text(text)


@pytest.mark.parametrize("call", range(1, 9))
def test_killed_at_any_rename_or_deletion(tmp_path, monkeypatch, call):
    """What is there is the old folder or the new one; the next run finishes and leaves nothing."""
    target = tmp_path / "made"
    write(target, "old")
    calls = 0

    def dying(name):
        own = getattr(*name)

        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                raise Killed
            return own(*args, **kwargs)

        monkeypatch.setattr(*name, wrapped)

    with monkeypatch.context():
        for name in ((os, "rename"), (shutil, "rmtree"), (new_folder, "_sync")):
            dying(name)
        try:
            write(target, "new")
        except Killed:
            pass
    monkeypatch.undo()
    texts = {"old", "new"}
    if target.exists():
        assert (target / "file").read_text() in texts
    else:  # between the two renames
        assert (tmp_path / "made.partial" / ".replaced" / "file").read_text() == "old"
    write(target, "newest")
    assert (target / "file").read_text() == "newest"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert [path.name for path in target.iterdir()] == ["file"]


def test_what_was_replaced_half_is_restored_before_it_is_refused(tmp_path):
    partial = tmp_path / "made.partial"
    (partial / ".replaced").mkdir(parents=True)
    (partial / MARK).touch()
    (partial / ".replaced" / "file").write_text("old")
    with pytest.raises(UserError, match="exists already"):
        write(tmp_path / "made", "new", overwrite=False)
    assert (tmp_path / "made" / "file").read_text() == "old"


def test_room_on_the_disk(tmp_path):
    with pytest.raises(UserError, match="needs .* GB, and .* GB left"):
        NewFolder(tmp_path / "made", tmp_path / "source", 1 << 60)
    assert not list(tmp_path.iterdir())


def test_errors_of_the_disk(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "file" / "made", "x")
    with pytest.raises(UserError, match="cannot be written: No space"):
        with NewFolder(tmp_path / "made", tmp_path / "source", 1):
            raise OSError(28, "No space left on device", "shard")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
