"""Jobs: real processes that outlive who started them, and are told from strangers' processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from backend import jobs
from backend.errors import UserError
from backend.jobs import Job, JobStore
from tests.app_process import ROOT, until

# argv: what to do. Stands in for app.py.
SCRIPT = """
import json, signal, sys, time

def tell(**event):
    print(json.dumps(event), flush=True)

what = sys.argv[1]
tell(event="stage", stage="work", total=4)
tell(event="step", stage="work", done=1, total=4, eta_s=9.0, loss=0.5)
print("log of", what, file=sys.stderr, flush=True)
if what == "secret":
    secret = sys.stdin.read()
    tell(event="note", text=f"{len(secret)} characters")
if what == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    tell(event="note", text="deaf")
if what in ("long", "stubborn"):
    time.sleep(600)
if what == "fail":
    tell(event="error", message="It is wrong.", hint="Mend it.")
    sys.exit(2)
print("a plain result")
tell(event="result", path="/somewhere")
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = new_store(tmp_path)
    yield store
    for job in store.list():
        if job.running:
            os.killpg(process(store, job).pid, signal.SIGKILL)


def new_store(root: Path) -> JobStore:
    """Also stands for a server that was started again: it knows files only."""
    return JobStore(root / "jobs", (sys.executable, "-c", SCRIPT))


def start(store: JobStore, what: str, **options) -> Job:
    return store.start([what, "--progress", "json"], f"A {what} job", "test", **options)


def ended(store: JobStore, job: Job) -> Job:
    until(lambda: not store.get(job.id).running, f"{job.title} does not end")
    return store.get(job.id)


def process(store: JobStore, job: Job) -> psutil.Process:
    record = json.loads((store.root / job.id / "job.json").read_text())
    return psutil.Process(record["pid"])


def stepped(store: JobStore, job: Job) -> None:
    """Wait until its command is at work."""
    until(lambda: store.progress(job.id).done == 1, "it does not begin")


def test_a_job_and_all_that_is_told_of_it(store: JobStore) -> None:
    job = start(store, "easy", details={"folder": "/models/x"})
    assert job.running and job.argv[0] == "easy" and job.details == {"folder": "/models/x"}
    assert job.command_line == "python app.py easy"
    job = ended(store, job)
    assert (job.state, job.exit_code) == ("finished", 0) and job.ended is not None
    progress = store.progress(job.id)
    assert (progress.stage, progress.done, progress.total, progress.share) == ("work", 1, 4, 0.25)
    assert progress.eta_s == 9.0 and progress.figures["loss"] == 0.5
    assert progress.result is not None and progress.result["path"] == "/somewhere"
    assert store.log_tail(job.id) == "log of easy\n"
    assert store.output(job.id) == "a plain result"
    assert [found.id for found in store.list()] == [job.id]
    store.remove(job.id)
    assert store.list() == []
    with pytest.raises(UserError, match="no such job"):
        store.get(job.id)


def test_an_error_is_told(store: JobStore) -> None:
    job = ended(store, start(store, "fail"))
    assert (job.state, job.exit_code) == ("failed", 2)
    error = store.progress(job.id).error
    assert error is not None and error["message"] == "It is wrong."


def test_cancel_ends_all_its_processes(store: JobStore) -> None:
    job = start(store, "long")
    stepped(store, job)
    shell = process(store, job)
    family = [shell, *shell.children(recursive=True)]
    assert store.cancel(job.id).state == "cancelled"
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert store.cancel(job.id).state == "cancelled"  # once more changes nothing


def test_who_does_not_listen_is_killed(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "TERM_S", 0.3)
    job = start(store, "stubborn")
    until(lambda: store.progress(job.id).notes == ["deaf"], "it does not begin")
    child = process(store, job).children()[0]
    store.cancel(job.id)
    assert ended(store, job).state == "cancelled"
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "it lives on")


def test_kill_minus_nine_is_a_death(store: JobStore) -> None:
    first, second = start(store, "long"), start(store, "long")
    stepped(store, first)
    stepped(store, second)
    process(store, first).children()[0].kill()  # as the kernel does when memory runs out
    assert (ended(store, first).state, store.get(first.id).exit_code) == ("died", 137)
    os.killpg(process(store, second).pid, signal.SIGKILL)
    assert (ended(store, second).state, store.get(second.id).exit_code) == ("died", None)


def test_a_restarted_server_finds_its_jobs(store: JobStore, tmp_path: Path) -> None:
    running, done = start(store, "long"), ended(store, start(store, "easy"))
    stepped(store, running)
    again = new_store(tmp_path)
    assert {j.id: j.state for j in again.list()} == {running.id: "running", done.id: "finished"}
    assert again.progress(running.id).done == 1
    with pytest.raises(UserError, match="is running"):
        again.remove(running.id)
    assert again.cancel(running.id).state == "cancelled"
    assert store.get(running.id).state == "cancelled"


def test_a_job_outlives_who_started_it(tmp_path: Path) -> None:
    """A server that is killed with its whole process group, as by a terminal that closes."""
    code = textwrap.dedent(f"""
        import os, signal, time
        from pathlib import Path
        from tests.unit.test_jobs import new_store, start, stepped
        store = new_store(Path({str(tmp_path)!r}))
        job = start(store, "long")
        stepped(store, job)
        os.killpg(0, signal.SIGKILL)
    """)
    server = subprocess.run([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    assert server.returncode == -signal.SIGKILL
    store = new_store(tmp_path)
    (job,) = store.list()
    assert job.running
    assert store.cancel(job.id).state == "cancelled"


def test_another_process_of_the_same_id_is_left_alone(store: JobStore) -> None:
    """After a reboot, or when ids come round again."""
    job = start(store, "long")
    stepped(store, job)
    innocent = process(store, job)
    path = store.root / job.id / "job.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"birth": "of another boot:1"}))
    assert store.get(job.id).state == "died"
    assert store.cancel(job.id).state == "died"
    assert innocent.is_running()
    path.write_text(json.dumps(record))
    assert store.cancel(job.id).state == "cancelled"


def test_secrets_reach_the_command_and_no_file(store: JobStore, tmp_path: Path) -> None:
    job = ended(store, start(store, "secret", secret="hf_very_secret"))
    assert store.progress(job.id).notes == ["14 characters"]
    for path in (store.root / job.id).iterdir():
        assert b"hf_very_secret" not in path.read_bytes()
    assert job.has_secret


def test_pause_resume_and_secrets_after_a_restart(store: JobStore, tmp_path: Path) -> None:
    job = start(store, "long", secret="hf_very_secret")
    stepped(store, job)
    assert store.pause(job.id).state == "paused"
    assert store.resume(job.id).running  # this server still knows the secret
    with pytest.raises(UserError, match="running"):
        store.resume(job.id)
    assert store.pause(job.id).state == "paused"
    again = new_store(tmp_path)
    with pytest.raises(UserError, match="token again"):
        again.resume(job.id)
    assert again.resume(job.id, secret="hf_very_secret").running
    assert again.cancel(job.id).state == "cancelled"
    assert [e["event"] for e in again.events(job.id)].count("run") == 3
    with pytest.raises(UserError, match="finished"):
        done = ended(store, start(store, "easy"))
        store.resume(done.id)


def test_a_paused_job_can_be_cancelled(store: JobStore) -> None:
    job = start(store, "long")
    stepped(store, job)
    store.pause(job.id)
    assert store.cancel(job.id).state == "cancelled"


@pytest.mark.parametrize("id", ["", "..", "../../etc", "20260101-000000-zzzzzz", None, 5])
def test_ids_that_are_none(store: JobStore, id) -> None:
    for action in (store.get, store.cancel, store.remove, store.log_tail, store.progress):
        with pytest.raises(UserError):
            action(id)


def test_half_lines_and_broken_files_are_survived(store: JobStore) -> None:
    job = ended(store, start(store, "easy"))
    with open(store.root / job.id / "progress.jsonl", "a") as file:
        file.write('{"event": "step", "do')
    assert store.progress(job.id).done == 1
    (store.root / job.id / "job.json").write_text("{")
    assert store.list() == []
    with suppress(UserError):
        store.remove(job.id)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="No job can be kept"):
        JobStore(tmp_path / "file").start(["list"], "x", "test")
