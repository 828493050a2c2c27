"""A plan carried out: bytes fetched, verified, and published as a whole.

However it ends, by Ctrl-C, kill -9 or a full disk, the next run goes on inside the file where this
one ended. Nothing that is not verified ever has its final name.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import requests

from backend.errors import UserError
from backend.hub.connection import Passing, body
from backend.hub.errors import DamagedError, NoSpaceError
from backend.hub.library import MANIFEST, Entry, Manifest, draft_of, locked, previous_of
from backend.hub.patience import Patience
from backend.hub.plan import Hub, Plan, part_of
from backend.hub.sources import HubFile

RATE_WINDOW_S = 10.0
REPORT_EVERY_S = 0.1
GAIN_BYTES = 1 << 16  # an attempt that brought so many was not for nothing
GIT_BYTES = 16 << 20  # larger files are none of git's
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a download is.

    Attributes:
        file: what is being fetched.
        done, total: bytes of all files, those included that were there before.
        bytes_per_s: of the last ten seconds.
        eta_s: seconds to go at that rate; None if nothing comes.
    """

    file: str
    done: int
    total: int
    bytes_per_s: float
    eta_s: float | None


Report = Callable[[Progress], None]


class _Lie(Exception):
    """What the server sends is not what the hub lists; the words are the middle of a sentence."""


def fetch(
    hub: Hub,
    plan: Plan,
    report: Report | None = None,
    cancel: threading.Event | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], bool] | None = None,
) -> Path:
    """Carry out a plan; returns its target, which then is complete.

    Args:
        report: called about ten times a second, in this thread.
        cancel: set it to stop; that takes as long as the server keeps silent, 20 s at most.
        clock: seconds from any origin.
        pause: see `Patience`.

    Raises:
        HubError: see backend/hub/errors.py. What was fetched is kept, but for what was wrong.
        UserError: the disk cannot be written to.
    """
    patience = Patience(cancel or threading.Event(), pause=pause)
    try:
        with locked(plan.target):
            _finish_swap(plan.target)
            if plan.complete:  # maybe by another process since the plan was made
                return plan.target
            if not plan.fits:
                raise _no_space(plan)
            _Fetcher(hub, plan, patience, _Meter(plan, report or (lambda _: None), clock)).run()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                f"The disk, or this user's share of it, is full: {plan.id} needs "
                f"{gigabytes(plan.total_bytes)} in all.",
                "What is fetched is kept. Free some space and run the same command.") from None
        raise UserError(f"{plan.target} cannot be written: {error.strerror}.",
                        "Name another --local-dir.") from None
    return plan.target


class _Fetcher:
    def __init__(self, hub: Hub, plan: Plan, patience: Patience, meter: _Meter) -> None:
        self.hub, self.plan, self.patience, self.meter = hub, plan, patience, meter
        self.target, self.draft = plan.target, draft_of(plan.target)

    def run(self) -> None:
        (self.draft / ".parts").mkdir(parents=True, exist_ok=True)
        before = Manifest.read(self.target)
        kept = Manifest.read(self.draft)
        manifest = self.plan.manifest()
        # Recorded from the start, so that a run for another commit knows whose the files are.
        manifest.files = {f.file.path: kept.files[f.file.path] for f in self.plan.files
                          if kept and f.file.path in kept.files
                          and kept.files[f.file.path].matches(f.file)}
        for planned in self.plan.files:
            file = planned.file
            if file.path in manifest.files:
                self.meter.finished(file)
                continue
            path = self.draft / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            entry = before.files.get(file.path) if before else None
            if entry and entry.matches(file):
                _copy(self.target / file.path, path)
            else:
                entry = self.file(file)
                part_of(self.target, file).replace(path)
            manifest.files[file.path] = entry
            manifest.write(self.draft)
            self.meter.finished(file)
        self.publish(manifest)

    def file(self, file: HubFile) -> Entry:
        """Fetch a file into its part; the part is whole and verified then."""
        part = part_of(self.target, file)
        size = 0

        def attempt() -> Entry:
            nonlocal size
            size = part.stat().st_size if part.exists() else 0
            return self.attempt(file, part)

        def gained() -> bool:
            return part.stat().st_size - size >= GAIN_BYTES

        for last in (False, True):
            try:
                return self.patience.run(self.hub.host, attempt, gained)
            except _Lie as lie:
                # Its beginning may be what is wrong: from an earlier run, or a range ill served.
                part.unlink(missing_ok=True)
                if last:
                    raise DamagedError(
                        f"{file.path} is not what {self.hub.host} lists: {lie}.",
                        "Nothing of it was kept. Try again later, or another --source.") from None
        raise AssertionError

    def attempt(self, file: HubFile, part: Path) -> Entry:
        """Fetch what the part lacks. Raises Passing, or _Lie."""
        with open(part, "r+b" if part.exists() else "w+b") as out:
            digest = _Digest(file)
            have = digest.take(out)
            if have < file.size:
                have = self.rest(file, out, have, digest)
            if have > file.size:
                raise _Lie(f"it has more than {file.size} bytes")
            if have < file.size:
                raise Passing("the answer ended early")
            out.flush()
            os.fsync(out.fileno())
        return digest.verified(file)

    def rest(self, file: HubFile, out: BinaryIO, have: int, digest: _Digest) -> int:
        """Append to the part from `have` on; returns its size then."""
        url = self.hub.protocol.url(self.plan.id, self.plan.commit or self.plan.revision, file.path)
        headers = {"Range": f"bytes={have}-"} if have else {}
        with self.hub.connection.get(url, headers) as response:
            if _start(response, file, have) != have:  # the server knows no ranges
                out.seek(0)
                out.truncate()
                have = digest.reset()
            self.meter.fetching(file, have, anew=True)
            for piece in body(response):
                self.patience.check()
                have += len(piece)
                if have > file.size:
                    break
                out.write(piece)
                digest.update(piece)
                self.meter.fetching(file, have)
        return have

    def publish(self, manifest: Manifest) -> None:
        """Give the folder its name. A former version goes on being read by who has it open."""
        shutil.rmtree(self.draft / ".parts")
        _delete_others(self.draft, manifest)
        self.take_along(manifest)
        manifest.write(self.draft)
        for folder in (self.draft, *filter(Path.is_dir, self.draft.rglob("*"))):
            _sync(folder)
        if self.target.is_dir():
            self.target.rename(previous_of(self.target))
        self.draft.rename(self.target)
        _sync(self.target.parent)
        shutil.rmtree(previous_of(self.target), ignore_errors=True)


    def take_along(self, manifest: Manifest) -> None:
        """What else the target holds: files that people put there, and, if it is this same
        version, those that an earlier download with other patterns fetched."""
        before = Manifest.read(self.target)
        if before is None:
            return
        same = before.commit == manifest.commit != ""
        for path in self.target.rglob("*"):
            name = path.relative_to(self.target).as_posix()
            own = name not in before.listed
            if path.is_dir() or name == MANIFEST or name in manifest.files or not (own or same):
                continue
            (self.draft / name).parent.mkdir(parents=True, exist_ok=True)
            _copy(path, self.draft / name)
            if name in before.files:
                manifest.files[name] = before.files[name]


class _Digest:
    """Checksums of a file, computed while it comes in: SHA-256, and git's where hubs list it."""

    def __init__(self, file: HubFile) -> None:
        self._size = file.size
        self._small = file.size <= GIT_BYTES or not file.sha256
        self.reset()

    def reset(self) -> int:
        self._sha256 = hashlib.sha256()
        self._blob = hashlib.sha1(b"blob %d\0" % self._size, usedforsecurity=False)
        return 0

    def update(self, piece: bytes) -> None:
        self._sha256.update(piece)
        if self._small:
            self._blob.update(piece)

    def take(self, file: BinaryIO) -> int:
        """Take in what the file holds, to its end; returns its size."""
        while piece := file.read(1 << 20):
            self.update(piece)
        return file.tell()

    def verified(self, file: HubFile) -> Entry:
        """The file's entry. Raises _Lie if the content is not the listed one."""
        blob = self._blob.hexdigest() if self._small else ""
        entry = Entry(file.size, self._sha256.hexdigest(), blob)
        if not entry.matches(file):
            raise _Lie("its checksum is another")
        return entry


class _Meter:
    """Counts bytes, and reports them."""

    def __init__(self, plan: Plan, report: Report, clock: Callable[[], float]) -> None:
        self._total, self._report, self._clock = plan.total_bytes, report, clock
        self._finished = 0
        self._last = -REPORT_EVERY_S
        self._marks: deque[tuple[float, int]] = deque()  # time, bytes fetched until then
        self._fetched = self._have = 0

    def fetching(self, file: HubFile, have: int, anew: bool = False) -> None:
        """`have` bytes of the file are there; `anew`: those came from the disk."""
        self._fetched += 0 if anew else have - self._have
        self._have = have
        self._tell(file, self._finished + have)

    def finished(self, file: HubFile) -> None:
        self._finished += file.size
        self._have = 0
        self._tell(file, self._finished, at_once=True)

    def _tell(self, file: HubFile, done: int, at_once: bool = False) -> None:
        now = self._clock()
        if now - self._last < REPORT_EVERY_S and self._marks and not at_once:
            return
        self._last = now
        self._marks.append((now, self._fetched))
        while now - self._marks[0][0] > RATE_WINDOW_S and len(self._marks) > 2:
            self._marks.popleft()
        seconds = now - self._marks[0][0]
        rate = (self._fetched - self._marks[0][1]) / seconds if seconds > 0 else 0.0
        left = self._total - done
        eta = left / rate if rate > 0 else (0.0 if left == 0 else None)
        self._report(Progress(file.path, done, self._total, rate, eta))


def _start(response: requests.Response, file: HubFile, have: int) -> int:
    """Where in the file the answer begins: at `have`, or at 0.

    ModelScope sends ranges with status 200, so Content-Range decides.

    Raises:
        _Lie: it begins elsewhere, or tells another size.
    """
    span = response.headers.get("Content-Range", "")
    if response.status_code == 416:
        raise _Lie(f"it has no more than {have} bytes")
    if not span and response.status_code != 206:
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) != file.size:
            raise _Lie(f"it has {length} bytes, not {file.size}")
        return 0
    found = _RANGE.fullmatch(span)
    if not found or int(found[1]) not in (have, 0) or found[2] not in (str(file.size), "*"):
        raise _Lie(f"the part of it that was sent is not the one asked for ({span!r:.60})")
    return int(found[1])


def _copy(source: Path, path: Path) -> None:
    """The same content under another name; without a second copy of the bytes, if that can be."""
    path.unlink(missing_ok=True)
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)


def _delete_others(folder: Path, manifest: Manifest) -> None:
    """Files of a version that was given up."""
    wanted = {folder / path for path in (*manifest.files, MANIFEST)}
    for path in folder.rglob("*"):
        if not path.is_dir() and path not in wanted:
            path.unlink()


def _finish_swap(target: Path) -> None:
    """What a kill between the two renames of `publish` has left undone."""
    previous = previous_of(target)
    if previous.exists() and not target.exists():
        previous.rename(target)
    shutil.rmtree(previous, ignore_errors=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _no_space(plan: Plan) -> NoSpaceError:
    free = shutil.disk_usage(plan.target.parent).free
    return NoSpaceError(
        f"{plan.id} needs {gigabytes(plan.bytes_to_fetch)} more, and the disk has "
        f"{gigabytes(free)} free.",
        "Free some space, or name a folder on another disk by --local-dir or LMDESK_HOME.")


def gigabytes(count: int) -> str:
    """Bytes as people write them: 1.53 GB, 12.0 MB, 0.6 kB."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
