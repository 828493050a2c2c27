"""Bytes fetched, resumed, verified, published."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from backend.errors import UserError
from backend.hub.errors import BusyError, DamagedError, NoSpaceError, OfflineError
from backend.hub.fetch import fetch
from backend.hub.library import discard, downloads, draft_of, find, locked, target_of
from backend.hub.plan import Hub, make_plan, part_of
from tests.app_process import ROOT, until
from tests.hub.conftest import (
    BIG,
    CHOSEN,
    ID,
    WEIGHTS,
    Pauses,
    contents,
    stop_midway,
    wanted,
)
from tests.stand_in import send


@pytest.mark.parametrize("source", ["huggingface", "mirror", "modelscope"])
def test_a_download_is_the_repository_byte_for_byte(stand_in, repository, source):
    assert find(ID) is None
    hub = Hub(source, stand_in.url)
    plan = make_plan(hub, ID)
    folder = fetch(hub, plan)
    assert contents(folder) == wanted(repository)
    assert find(ID).manifest.commit == stand_in.commit(ID)
    assert [found.folder for found in downloads()] == [folder]
    assert sum(map(len, contents(folder).values())) == find(ID).bytes
    assert sorted(path.name for path in folder.parent.iterdir()) == [
        ".tiny-model.lock", "tiny-model"]
    assert all(stand_in.commit(ID) in path for _, path, _ in stand_in.seen
               if "resolve" in path or "Revision" in path)  # pinned
    count = len(stand_in.seen)
    assert fetch(hub, plan) == folder and len(stand_in.seen) == count


def test_a_folder_of_ones_own_with_subfolders(stand_in, repository, tmp_path, hub):
    plan = make_plan(hub, ID, local_dir=tmp_path / "here" / "model", include=["*"],
                     exclude=["*.py"])
    folder = fetch(hub, plan)
    assert contents(folder) == {name: (repository / name).read_bytes() for name in [
        *CHOSEN, "pytorch_model.bin", "onnx/config.json", "onnx/model.onnx"]}
    assert not downloads()


def test_a_link_to_another_disk_stays_one(stand_in, repository, tmp_path, hub):
    (tmp_path / "large").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "large")
    fetch(hub, make_plan(hub, ID, local_dir=tmp_path / "model"))
    assert (tmp_path / "model").is_symlink()
    assert contents(tmp_path / "large") == wanted(repository)


def test_a_stopped_download_goes_on_inside_the_file(stand_in, repository, hub, plan):
    part = stop_midway(stand_in, hub, plan)
    have = part.stat().st_size
    assert 50_000 < have < WEIGHTS and find(ID) is None and not plan.target.exists()
    again = make_plan(hub, ID)
    states = {planned.file.path: planned for planned in again.files}
    assert states["config.json"].verified and states[BIG].partial == have
    stand_in.seen.clear()
    assert contents(fetch(hub, again)) == wanted(repository)
    assert [headers["range"] for headers in stand_in.fetched(BIG)] == [f"bytes={have}-"]
    assert not stand_in.fetched("config.json")


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_goes_on_inside_the_file(stand_in, repository, hub, plan, by):
    stand_in.bytes_per_s = 50_000
    child = subprocess.Popen(
        [sys.executable, "app.py", "download", ID, "--endpoint", stand_in.url], cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    big = next(planned.file for planned in plan.files if planned.file.path == BIG)
    part = part_of(plan.target, big)
    try:
        until(lambda: part.exists() and part.stat().st_size > 20_000, "nothing comes")
        stand_in.bytes_per_s = 4_000  # a minute for the rest: however busy, it is not done before
        with pytest.raises(BusyError, match="another process"):
            fetch(hub, plan)
    finally:
        child.send_signal(by)
        said = child.communicate()[1]
    if by == signal.SIGINT:
        assert child.returncode == 130 and "Stopped. The same command goes on from here." in said
    have = part.stat().st_size
    assert have < WEIGHTS and not plan.target.exists()
    stand_in.bytes_per_s = 0
    stand_in.seen.clear()
    assert contents(fetch(hub, make_plan(hub, ID))) == wanted(repository)
    assert stand_in.fetched(BIG)[0]["range"] == f"bytes={have}-"


def test_a_server_without_ranges_begins_anew(stand_in, repository, hub, plan):
    stop_midway(stand_in, hub, plan)
    stand_in.ranges = False
    stand_in.seen.clear()
    assert contents(fetch(hub, plan)) == wanted(repository)
    assert len(stand_in.fetched(BIG)) == 1  # that very answer was taken


def test_a_part_of_status_200_is_one_if_it_says_so(stand_in, repository):
    """As ModelScope sends them."""
    hub = Hub("modelscope", stand_in.url)
    plan = make_plan(hub, ID)
    have = stop_midway(stand_in, hub, plan).stat().st_size
    stand_in.range_status = 200
    dones = []
    fetch(hub, plan, lambda progress: dones.append(progress.done))
    assert contents(plan.target) == wanted(repository)
    assert min(dones[3:]) >= have


def test_cut_connections_are_resumed(stand_in, repository, hub, plan):
    stand_in.cut_after = 100_000
    pauses = Pauses()
    assert contents(fetch(hub, plan, pause=pauses)) == wanted(repository)
    assert [headers.get("range") for headers in stand_in.fetched(BIG)] == [
        None, "bytes=100000-", "bytes=200000-"]
    assert pauses == [1, 1]  # each brought it forward


def test_a_server_that_falls_silent_is_asked_again(stand_in, repository, hub, plan, monkeypatch):
    monkeypatch.setattr("backend.hub.connection.IDLE_S", 0.2)
    go_on = threading.Event()
    content = (repository / BIG).read_bytes()

    def silent(handler):
        del stand_in.answers[path]
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:1000])
        go_on.wait(60)

    path = f"/lfs/{ID}//{BIG}"
    stand_in.answers[path] = silent
    try:
        assert contents(fetch(hub, plan, pause=Pauses())) == wanted(repository)
    finally:
        go_on.set()
    assert stand_in.fetched(BIG)[-1]["range"] == "bytes=1000-"


def test_an_answer_without_length_in_chunks(stand_in, repository, hub, plan):
    content = (repository / BIG).read_bytes()

    def chunked(handler):
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for piece in (content[:100_000], content[100_000:], b""):
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))

    stand_in.answers[f"/lfs/{ID}//{BIG}"] = chunked
    assert contents(fetch(hub, plan)) == wanted(repository)


def test_what_brings_nothing_is_given_up(stand_in, hub, plan):
    pauses = Pauses()
    stand_in.failing = 3
    stand_in.cut_after = 1
    with pytest.raises(OfflineError, match="cannot be used now"):
        fetch(hub, plan, pause=pauses)
    assert pauses == [1, 2, 4, 8]
    stand_in.cut_after = 0
    assert fetch(hub, plan).is_dir()


def test_a_passing_failure_of_the_server_passes(stand_in, repository, hub, plan):
    stand_in.failing = 4
    pauses = Pauses()
    assert contents(fetch(hub, plan, pause=pauses)) == wanted(repository)
    assert pauses == [1, 2, 4, 8]


@pytest.mark.parametrize("name", [BIG, "config.json"])  # by SHA-256, by git's SHA-1
@pytest.mark.parametrize("change", [
    lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    lambda content: content + b"!",
    lambda content: content[:-1],
    lambda content: b"",
    lambda content: b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_lying_server_publishes_nothing(stand_in, repository, hub, plan, name, change):
    stand_in.alter = lambda path, content: change(content) if path == name else content
    with pytest.raises(DamagedError, match=f"{name} is not what 127.0.0.1:.* lists"):
        fetch(hub, plan, pause=Pauses())
    assert len(stand_in.fetched(name)) == 2  # once more, as the first may have been bad luck
    assert not plan.target.exists() and find(ID) is None
    assert not list((draft_of(plan.target) / ".parts").iterdir())
    stand_in.alter = lambda path, content: content
    assert contents(fetch(hub, plan)) == wanted(repository)


def test_a_damaged_part_is_fetched_anew_once(stand_in, repository, hub, plan):
    part = stop_midway(stand_in, hub, plan)
    with open(part, "r+b") as file:
        file.write(b"rotten")
    assert contents(fetch(hub, plan)) == wanted(repository)


def test_a_part_that_is_too_long_is_fetched_anew(stand_in, repository, hub, plan):
    part = stop_midway(stand_in, hub, plan)
    part.write_bytes(bytes(WEIGHTS + 5))
    assert contents(fetch(hub, plan)) == wanted(repository)


@pytest.mark.parametrize("span", ["bytes 7-9/300000", "bytes 0-1/5", "nonsense", ""])
def test_ranges_that_were_not_asked_for(stand_in, hub, plan, span):
    headers = {"Content_Range": span} if span else {}
    stand_in.answers[f"/lfs/{ID}//{BIG}"] = send(206, "application/octet-stream", b"x" * 10,
                                                 **headers)
    with pytest.raises(DamagedError, match="not the one asked for"):
        fetch(hub, plan, pause=Pauses())


def test_one_process_at_a_time(hub, plan):
    with locked(plan.target):
        with pytest.raises(BusyError):
            fetch(hub, plan)
        with pytest.raises(BusyError):
            discard(plan.target)
    assert fetch(hub, plan)


def test_what_is_left_can_be_discarded(stand_in, hub, plan):
    part = stop_midway(stand_in, hub, plan)
    discard(plan.target)
    assert not part.exists() and not draft_of(plan.target).exists()
    discard(target_of("space/never-begun"))


def test_a_disk_that_is_too_small_is_told_first(stand_in, hub, monkeypatch):
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("backend.hub.plan.shutil.disk_usage", lambda path: usage)
    plan = make_plan(hub, ID)
    assert not plan.fits
    with pytest.raises(NoSpaceError, match="needs 300.* kB more, and the disk has 1.0 kB free"):
        fetch(hub, plan)
    assert not stand_in.fetched("config.json")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_keeps_what_is_there(stand_in, repository, hub, plan, monkeypatch,
                                                  code):
    real = os.fsync

    def full(descriptor: int) -> None:
        if os.fstat(descriptor).st_size == WEIGHTS:
            raise OSError(code, "full")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(NoSpaceError, match="kept. Free some space"):
            fetch(hub, plan)
    stand_in.seen.clear()
    assert contents(fetch(hub, plan)) == wanted(repository)
    assert not stand_in.fetched(BIG)


def test_a_folder_that_cannot_be_written_to(stand_in, tmp_path, hub):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written|is there already"):
        fetch(hub, make_plan(hub, ID, local_dir=tmp_path / "file" / "model"))


def test_progress_grows_to_its_end_and_tells_the_rate(stand_in, hub, plan):
    seconds = iter(range(10_000))
    seen = []
    fetch(hub, plan, seen.append, clock=lambda: float(next(seconds)))
    dones = [progress.done for progress in seen]
    assert dones == sorted(dones) and dones[-1] == seen[-1].total == plan.total_bytes
    assert seen[-1].eta_s == 0 and seen[0].eta_s is None
    middle = [p for p in seen if p.file == BIG and p.bytes_per_s > 0][1]
    left = middle.total - middle.done
    assert middle.eta_s == pytest.approx(left / middle.bytes_per_s)
    assert {progress.file for progress in seen} == set(CHOSEN)


def test_the_manifest_is_what_it_says(hub, plan):
    data = json.loads((fetch(hub, plan) / ".download.json").read_text())
    assert data["id"] == ID and data["source"] == "huggingface" and data["revision"] == "main"
    assert data["files"][BIG]["size"] == WEIGHTS and len(data["files"][BIG]["sha256"]) == 64
