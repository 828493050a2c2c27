"""Where downloaded models lie, and what is known of each: its manifest.

A model NAMESPACE/NAME is the folder `models_dir()/NAMESPACE/NAME`, or NAME@REVISION if a revision
was asked for. The folder gets its name when all its files are verified, not before; until then
they lie beside it in `.NAME.download`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from backend.data_dir import data_dir
from backend.errors import UserError
from backend.hub.errors import BusyError
from backend.hub.names import checked_id, checked_revision
from backend.hub.sources import HubFile
from backend.model_files import read_json

MANIFEST = ".download.json"


@dataclass(frozen=True, slots=True)
class Entry:
    """A verified file: bytes, SHA-256, and git's SHA-1 of it as a blob ("" of large files)."""

    size: int
    sha256: str
    blob: str

    def matches(self, file: HubFile) -> bool:
        """Whether it is the listed one. A large file's listed blob is that of a pointer to it."""
        if self.size != file.size:
            return False
        return self.sha256 == file.sha256 if file.sha256 else self.blob == file.blob


@dataclass(slots=True)
class Manifest:
    """What a folder holds; kept in it as `.download.json`. Fields as those of `Plan`.

    Attributes:
        files: those that are there, of the size they had.
        listed: names of all that were there once.
    """

    id: str
    source: str
    endpoint: str
    revision: str
    commit: str
    files: dict[str, Entry] = field(default_factory=dict)
    listed: frozenset[str] = frozenset()

    @property
    def whole(self) -> bool:
        """Whether none of its files has gone or changed its size since."""
        return len(self.files) == len(self.listed) > 0

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The folder's manifest; None if it has none, or one that cannot be used."""
        try:
            data = read_json(folder / MANIFEST)
            files = {path: Entry(**entry) for path, entry in data.pop("files").items()}
            manifest = cls(**data, listed=frozenset(files))
        except (UserError, KeyError, TypeError, AttributeError):
            return None
        for path, entry in files.items():
            with contextlib.suppress(OSError):
                if (folder / path).stat().st_size == entry.size:
                    manifest.files[path] = entry
        return manifest

    def write(self, folder: Path) -> None:
        """Store it, at once or not at all."""
        data = asdict(self)
        del data["listed"]
        draft = folder / (MANIFEST + ".new")
        with open(draft, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(folder / MANIFEST)


@dataclass(frozen=True, slots=True)
class Download:
    """A model that is there, whole and verified."""

    folder: Path
    manifest: Manifest

    @property
    def bytes(self) -> int:
        return sum(entry.size for entry in self.manifest.files.values())


def models_dir() -> Path:
    """The folder of downloaded models, see `data_dir`."""
    return data_dir() / "models"


def target_of(id: str, revision: str = "") -> Path:
    """Where a model is, or will be. Raises UserError if the id or the revision is none."""
    folder = models_dir() / checked_id(id)
    if revision:
        folder = folder.with_name(f"{folder.name}@{checked_revision(revision).replace('/', '-')}")
    return folder


def find(id: str, revision: str = "") -> Download | None:
    """The downloaded copy of a model, if it is complete."""
    return _download(target_of(id, revision))


def downloads() -> list[Download]:
    """All complete copies, by name."""
    folders = sorted(models_dir().glob("[!.]*/[!.]*"))
    return [found for folder in folders if (found := _download(folder))]


def discard(target: Path) -> None:
    """Delete what a stopped download has left. The model itself, if it is there, stays.

    Raises:
        BusyError: it is going on.
    """
    with locked(target):
        shutil.rmtree(draft_of(target), ignore_errors=True)


def draft_of(target: Path) -> Path:
    """Where files are gathered until all are verified: on the target's file system."""
    return target.with_name(f".{target.name}.download")


def previous_of(target: Path) -> Path:
    """Where the model's former version is for the moment between two renames."""
    return target.with_name(f".{target.name}.previous")


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Be the only process that works on a target. The lock ends with the process, however it ends.

    Raises:
        BusyError: another process holds it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(f".{target.name}.lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"{target.name} is being downloaded by another process.",
                            "Wait until it is done.") from None
        yield


def _download(folder: Path) -> Download | None:
    manifest = Manifest.read(folder)
    return Download(folder, manifest) if manifest and manifest.whole else None
