"""Long tasks as processes of their own, which outlive the browser and the server.

A job runs the very command line that a terminal's user would run, and is a folder:

    jobs/<id>/job.json         what it is, and its process
    jobs/<id>/progress.jsonl   its standard output: events as JSON lines, or a plain result
    jobs/<id>/log.txt          its standard error
    jobs/<id>/exit             its exit code, once it has ended

Whoever shows a job only reads these files, so a restarted server, and any tab of any browser, is
attached again by looking. Everything here blocks, briefly but for `cancel` and `pause`: run it in
a thread.

    job = store.start(["lite", "auto_awq", folder, "--progress", "json"], "Qwen in 4 bits",
                      "quantize", details={"result": "/models/qwen-awq"})
    store.progress(job.id).share, store.log_tail(job.id), store.cancel(job.id)
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from backend.errors import UserError
from backend.job_events import JobProgress

State = Literal["running", "paused", "finished", "failed", "cancelled", "died"]
PROJECT = Path(__file__).resolve().parents[1]
APP = (sys.executable, str(PROJECT / "app.py"))
TERM_S = 10.0  # between asking a job to end and killing it
LOG_BYTES = 20_000
EVENT_BYTES = 4 << 20  # of the events that are read; older ones of a longer job are left out
_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")
# The shell stays when the group is asked to end, so that the exit code is told.
_RUN = 'trap : TERM; "$@"; code=$?; printf %s "$code" > "$0.new"; mv "$0.new" "$0"'


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it stood when it was looked at.

    Attributes:
        kind: "download", "quantize", ...: which tab understands its events.
        title: one line for people.
        argv: of app.py.
        details: what the tab that started it wants to know later, as JSON.
        created, started: seconds since the epoch; `started` of its last run.
        state: "failed" by itself, with an error told; "died" without a word, as by kill -9.
        exit_code: of the command; None while it runs, and if nobody knows.
        ended: when the exit code was written.
        has_secret: its command reads a secret from standard input; see `resume`.
    """

    id: str
    kind: str
    title: str
    argv: tuple[str, ...]
    details: dict[str, Any]
    created: float
    started: float
    state: State
    exit_code: int | None
    ended: float | None
    has_secret: bool

    @property
    def running(self) -> bool:
        return self.state == "running"

    @property
    def command_line(self) -> str:
        """What to type in a terminal for the same."""
        words = list(self.argv)
        if "--progress" in words:
            at = words.index("--progress")
            del words[at:at + 2]
        return shlex.join(["python", "app.py", *words])


@dataclass(slots=True)
class _Record:
    """job.json. Never holds a secret."""

    kind: str
    title: str
    argv: list[str]
    details: dict[str, Any]
    created: float
    has_secret: bool
    started: float = 0.0
    pid: int = 0
    birth: str = ""
    stop: str = ""  # "pause" or "cancel", once it was asked to end


class JobStore:
    """All jobs of a folder; several servers may look after the same one.

    Args:
        root: the folder; made when it is needed.
        command: what `argv` is appended to.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        root: Path,
        command: Sequence[str] = APP,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.root = root
        self._command = tuple(command)
        self._clock = clock
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._secrets: dict[str, str] = {}  # in memory only
        self._lock = threading.Lock()

    def start(
        self,
        argv: Sequence[str],
        title: str,
        kind: str,
        *,
        details: Mapping[str, Any] | None = None,
        secret: str | None = None,
    ) -> Job:
        """Run `python app.py ARGV` as a job.

        Args:
            secret: goes to the command's standard input (as for `--token-file -`), nowhere else.

        Raises:
            UserError: the job's folder cannot be written.
        """
        now = self._clock()
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
        id = f"{stamp}-{secrets.token_hex(3)}"
        record = _Record(kind, title, list(argv), dict(details or {}), now, secret is not None)
        try:
            (self.root / id).mkdir(parents=True)
        except OSError as error:
            raise UserError(f"No job can be kept in {self.root}: {error.strerror}.",
                            "Make room there, or set LMDESK_HOME to another folder.") from None
        if secret is not None:
            self._secrets[id] = secret
        return self._run(id, record)

    def resume(self, id: str, *, secret: str | None = None) -> Job:
        """Run a job's command once more, as the same job: downloads and quantizations go on.

        Raises:
            UserError: there is no such job, it is running or finished, or it needs its secret
                again because the server was started anew meanwhile.
        """
        with self._lock:
            job = self.get(id)
            if job.state in ("running", "finished"):
                raise UserError(f"{job.title} is {job.state}.")
            if secret is not None:
                self._secrets[id] = secret
            if job.has_secret and id not in self._secrets:
                raise UserError(f"{job.title} needs its token again: tokens are never stored.",
                                "Type it where the job was started.", field="token")
            return self._run(id, self._record(id))

    def list(self) -> Sequence[Job]:
        """All jobs, the newest first."""
        ids = sorted((p.name for p in self.root.glob("*") if _ID.fullmatch(p.name)), reverse=True)
        return [job for id in ids if (job := self._read(id))]

    def get(self, id: str) -> Job:
        """A job as it stands. Raises UserError if there is none of that id."""
        job = self._read(id) if isinstance(id, str) and _ID.fullmatch(id) else None
        if job is None:
            raise UserError("There is no such job (any more).", "Look at the list of jobs.")
        return job

    def cancel(self, id: str) -> Job:
        """End a job: SIGTERM to all its processes, SIGKILL 10 s later. What is ended, stays."""
        return self._stop(id, "cancel")

    def pause(self, id: str) -> Job:
        """The same, but its state is "paused" then: somebody means to `resume` it."""
        return self._stop(id, "pause")

    def remove(self, id: str) -> None:
        """Forget a job; what it has made stays. Raises UserError while it runs."""
        job = self.get(id)
        if job.running:
            raise UserError(f"{job.title} is running.", "Cancel it first.")
        self._secrets.pop(id, None)
        shutil.rmtree(self.root / id, ignore_errors=True)

    def log_tail(self, id: str, most: int = LOG_BYTES) -> str:
        """The end of what the command wrote to standard error, whole lines."""
        self.get(id)
        return _tail(self.root / id / "log.txt", most)

    def output(self, id: str, most: int = LOG_BYTES) -> str:
        """The end of its standard output, but for events."""
        self.get(id)
        lines = _tail(self.root / id / "progress.jsonl", most).splitlines()
        return "\n".join(line for line in lines if not line.startswith('{"event"'))

    def events(self, id: str) -> Iterator[dict[str, Any]]:
        """Its events from the first on. {"event": "run"} comes before those of each run."""
        self.get(id)
        for line in _tail(self.root / id / "progress.jsonl", EVENT_BYTES).splitlines():
            with suppress(ValueError):  # half a line that is being written, or none of ours
                event = json.loads(line)
                if isinstance(event, dict) and "event" in event:
                    yield event

    def progress(self, id: str) -> JobProgress:
        """The sum of its events."""
        progress = JobProgress()
        for event in self.events(id):
            progress.add(event)
        return progress

    def _run(self, id: str, record: _Record) -> Job:
        folder = self.root / id
        (folder / "exit").unlink(missing_ok=True)
        secret = self._secrets.get(id)
        with open(folder / "progress.jsonl", "ab") as out, open(folder / "log.txt", "ab") as log:
            out.write(b'{"event": "run"}\n')
            out.flush()
            process = subprocess.Popen(
                ["/bin/sh", "-c", _RUN, str(folder / "exit"), *self._command, *record.argv],
                stdin=subprocess.DEVNULL if secret is None else subprocess.PIPE,
                stdout=out, stderr=log, start_new_session=True,
            )
        self._children[id] = process
        record.started, record.pid, record.stop = self._clock(), process.pid, ""
        record.birth = _birth(process.pid) or ""
        self._write(id, record)
        if process.stdin is not None:
            with suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write((secret or "").encode())
        return self.get(id)

    def _stop(self, id: str, how: str) -> Job:
        job = self.get(id)
        record = self._record(id)
        if job.state == "paused" and how == "cancel":
            record.stop = how
            self._write(id, record)
        if not job.running:
            return self.get(id)
        record.stop = how
        self._write(id, record)
        for kind, seconds in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, TERM_S)):
            with suppress(ProcessLookupError):
                os.killpg(record.pid, kind)
            deadline = time.monotonic() + seconds
            while (job := self.get(id)).running and time.monotonic() < deadline:
                time.sleep(0.05)
            if not job.running:
                break
        return job

    def _read(self, id: str) -> Job | None:
        if (child := self._children.get(id)) and child.poll() is not None:  # no zombie
            del self._children[id]
        try:
            record = self._record(id)
        except UserError:
            return None
        code, ended = _exit_code(self.root / id / "exit")
        alive = code is None and bool(record.birth) and _birth(record.pid) == record.birth
        if code is None and not alive:
            code, ended = _exit_code(self.root / id / "exit")  # maybe it ended in between
        if alive:
            state: State = "running"
        elif code == 0:
            state = "finished"
        elif record.stop:
            state = "paused" if record.stop == "pause" else "cancelled"
        else:
            state = "died" if code is None or code > 128 else "failed"
        if not alive and state in ("finished", "cancelled"):
            self._secrets.pop(id, None)
        return Job(id, record.kind, record.title, tuple(record.argv), record.details,
                   record.created, record.started, state, code, ended, record.has_secret)

    def _record(self, id: str) -> _Record:
        try:
            return _Record(**json.loads((self.root / id / "job.json").read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            raise UserError("The job's job.json cannot be read.", "Remove the job.") from None

    def _write(self, id: str, record: _Record) -> None:
        draft = self.root / id / "job.json.new"
        draft.write_text(json.dumps(asdict(record), ensure_ascii=False, indent=1), "utf-8")
        draft.replace(self.root / id / "job.json")


def _exit_code(path: Path) -> tuple[int | None, float | None]:
    try:
        return int(path.read_text()), path.stat().st_mtime
    except (OSError, ValueError):
        return None, None


def _tail(path: Path, most: int) -> str:
    """The end of a file from a line's beginning on; "" if there is none."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - most, 0))
            data = file.read(most)
    except OSError:
        return ""
    if size > most:
        data = data.partition(b"\n")[2]
    return data.decode("utf-8", errors="replace")


def _birth(pid: int) -> str | None:
    """What tells a process from a later one of the same id; None if it has ended.

    On Linux the boot and the kernel's ticks since then: seconds of the clock would change with it.
    """
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return None if after_name[0] in "ZX" else f"{boot}:{after_name[19]}"
    except OSError:
        if Path("/proc/self").exists():
            return None
    with suppress(psutil.Error):
        return str(psutil.Process(pid).create_time())
    return None
