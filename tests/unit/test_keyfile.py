"""Key files: private, whole, and believed only if nobody else can have touched them."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from backend import keyfile
from backend.errors import UserError


def test_key_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    key, path = keyfile.new_key(), keyfile.key_path(1)
    assert key.startswith("sk-") and len(key) == 46 and key != keyfile.new_key()
    assert keyfile.read_key(1) is None
    keyfile.write_key(1, "old")
    keyfile.write_key(1, key)
    assert keyfile.read_key(1) == key and keyfile.read_key(2) is None
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert os.listdir(path.parent) == [path.name]
    path.chmod(0o640)
    assert keyfile.read_key(1) is None
    for content in (b"", b"two words", b"\xff", b"a" * 5000):
        path.write_bytes(content)
        path.chmod(0o600)
        assert keyfile.read_key(1) is None
    other = path.rename(path.with_name("other"))
    path.symlink_to(other)
    assert keyfile.read_key(1) is None
    path.unlink()
    os.mkfifo(path, 0o600)
    assert keyfile.read_key(1) is None
    monkeypatch.setenv("XDG_DATA_HOME", str(other))
    with pytest.raises(UserError, match="cannot be stored.*--api-keys"):
        keyfile.write_key(1, key)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    keyfile.write_key(1, "sk-key")
    return keyfile.key_path(1).parent


def test_a_directory_that_others_may_use_is_not_believed(folder: Path) -> None:
    for mode in (0o777, 0o1777, 0o770, 0o750, 0o755):
        folder.chmod(mode)
        assert keyfile.read_key(1) is None
    keyfile.write_key(2, "sk-new")  # and writing puts it right
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (keyfile.read_key(1), keyfile.read_key(2)) == ("sk-key", "sk-new")


def test_a_directory_that_is_a_link_is_not_used(folder: Path) -> None:
    folder.symlink_to(folder.rename(folder.with_name("elsewhere")))
    assert keyfile.read_key(1) is None
    with pytest.raises(UserError, match="cannot be stored in .*not a directory of this user"):
        keyfile.write_key(1, "sk-new")
    assert os.listdir(folder) == [keyfile.key_path(1).name]


def test_what_belongs_to_another_user_is_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert keyfile.read_key(1) is None
    with pytest.raises(UserError, match="cannot be stored"):
        keyfile.write_key(1, "sk-new")


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert keyfile.read_key(1) is None
    with pytest.raises(UserError, match="no home directory. Give --api-keys"):
        keyfile.write_key(1, "sk-new")


def test_a_key_that_cannot_be_stored_leaves_the_old_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        keyfile.write_key(1, "sk-new")
    assert keyfile.read_key(1) == "sk-key"
    assert os.listdir(folder) == [keyfile.key_path(1).name]
