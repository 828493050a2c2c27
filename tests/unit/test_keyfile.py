"""Key files: private, whole, and believed only if nobody else can have touched them."""

from __future__ import annotations

import os
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
