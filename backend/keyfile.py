"""The API key of a server, for clients of the same user on the same machine.

A server that makes a key of its own writes it here, so that `app.py chat http://127.0.0.1:PORT`
needs no copying. Only files that nobody else can have written or read are believed.
"""

from __future__ import annotations

import os
import platform
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from backend.errors import UserError

MAX_BYTES = 4096


def new_key() -> str:
    """A random key of 256 bits, as OpenAI's clients expect one to look."""
    return "sk-" + secrets.token_urlsafe(32)


def key_path(port: int) -> Path:
    """Where the key of this machine's server on `port` lies.

    In the user's data directory: the runtime directory is often unset in one of two shells. The
    machine's name is in it because home directories may be shared.
    """
    import platformdirs  # only here: benchmarks run where it is not installed

    return platformdirs.user_data_path("lmdesk") / "keys" / f"{platform.node()}-{port}"


def write_key(port: int, key: str) -> None:
    """Store `key` for `read_key`, at once or not at all.

    Raises:
        UserError: it cannot be stored where only this user reads it.
    """
    try:
        path = key_path(port)
    except RuntimeError:  # a container's user id without a name
        raise UserError("The API key cannot be stored, because this user has no home directory.",
                        "Give --api-keys yourself.") from None
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_own(path.parent.lstat(), stat.S_IFDIR):  # root could write there all the same
            raise PermissionError(0, "it is not a directory of this user's own")
        path.parent.chmod(0o700)
        with open(draft, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(key)
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise UserError(
            f"The API key cannot be stored in {path.parent}: {error.strerror}.",
            "Give --api-keys yourself.") from None


def read_key(port: int) -> str | None:
    """The key of this machine's server on `port`; None if there is none that can be trusted."""
    try:
        path = key_path(port)
        # Whoever may write to the directory could give another file of ours this name.
        if not _is_own(path.parent.lstat(), stat.S_IFDIR, 0o700):
            return None
        # Neither follow a link nor wait at a pipe that somebody left here.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, RuntimeError):  # see `write_key`
        return None
    with open(fd, "rb") as file:
        info = os.fstat(fd)
        if not _is_own(info, stat.S_IFREG, 0o600) or info.st_size > MAX_BYTES:
            return None
        key = file.read(MAX_BYTES).decode("ascii", errors="replace").strip()
    return key if is_sendable(key) else None


def _is_own(info: os.stat_result, kind: int, mode: int | None = None) -> bool:
    """Whether it is of that kind, belongs to this process's user, and has that very mode."""
    return (stat.S_IFMT(info.st_mode) == kind and info.st_uid == os.geteuid()
            and mode in (None, stat.S_IMODE(info.st_mode)))


def is_sendable(key: str) -> bool:
    """Whether an HTTP header can carry `key`."""
    return bool(key) and all("!" <= char <= "~" for char in key)
