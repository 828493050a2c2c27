"""The key that a server leaves for its own user's clients on the same machine.

One file a port, readable by its owner only, in the user's runtime directory.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from platformdirs import user_runtime_path

MAX_BYTES = 4096


def new_key() -> str:
    """A random key of 256 bits."""
    return "sk-" + secrets.token_urlsafe(32)


def key_path(port: int) -> Path:
    """Where the key of the server on `port` lies."""
    return user_runtime_path("lmdesk") / f"key-{port}"


def write_key(port: int, key: str) -> Path:
    """Leave a key, in a file of mode 0600 in a directory of mode 0700, in one step."""
    path = key_path(port)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w", encoding="ascii") as file:
        file.write(key)
    draft.replace(path)
    return path


def read_key(port: int) -> str | None:
    """The key left for `port`; None if there is none, or if others could have written it."""
    try:
        fd = os.open(key_path(port), os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | os.O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return None
        if stat.S_IMODE(status.st_mode) & 0o077:
            return None
        return file.read(MAX_BYTES).decode("ascii", errors="replace").strip() or None
