"""Whatever a server does, and whenever we are stopped: the right bytes, or none."""

from __future__ import annotations

import random
import shutil
import threading
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from backend.hub.errors import HubError
from backend.hub.fetch import fetch
from backend.hub.plan import Hub, make_plan
from tests.hub.conftest import ID
from tests.stand_in_hub import StandInHub

SIZE = 200_000
NAME = "model.safetensors"
CONTENT = random.Random(2).randbytes(SIZE)
PATH = f"/lfs/{ID}//{NAME}"


def reply(handler, status: int, body: bytes, claims: int | None = None, span: str = "") -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if claims is None else claims))
    if span:
        handler.send_header("Content-Range", span)
    handler.end_headers()
    handler.wfile.write(body)


def begins(handler) -> int:
    return int(handler.headers.get("Range", "bytes=0-")[6:-1])


def tail(handler) -> tuple[bytes, str]:
    start = begins(handler)
    return CONTENT[start:], f"bytes {start}-{SIZE - 1}/{SIZE}" if start else ""


def honest(handler, amount: int) -> None:
    body, span = tail(handler)
    reply(handler, 206 if span else 200, body, span=span)


def cut(handler, amount: int) -> None:
    body, span = tail(handler)
    reply(handler, 206 if span else 200, body[:amount], len(body), span)


def without_ranges(handler, amount: int) -> None:
    reply(handler, 200, CONTENT)


def without_ranges_cut(handler, amount: int) -> None:
    reply(handler, 200, CONTENT[:amount], SIZE)


def as_modelscope(handler, amount: int) -> None:
    body, span = tail(handler)
    reply(handler, 200, body, span=span)


def rotten(handler, amount: int) -> None:
    body, span = tail(handler)
    at = amount % max(len(body), 1)
    reply(handler, 206 if span else 200, body[:at] + b"?" + body[at + 1:], span=span)


def shifted(handler, amount: int) -> None:
    """Right headers, wrong place."""
    _, span = tail(handler)
    start = (begins(handler) + amount) % SIZE
    reply(handler, 206 if span else 200, CONTENT[start:], span=span)


def longer(handler, amount: int) -> None:
    body, span = tail(handler)
    reply(handler, 206 if span else 200, body + b"!" * amount, span=span)


def busy(handler, amount: int) -> None:
    reply(handler, 503, b"")


def nothing(handler, amount: int) -> None:
    handler.close_connection = True


FAULTS = [honest, cut, cut, without_ranges, without_ranges_cut, as_modelscope, rotten, shifted,
          longer, busy, nothing]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    (folder / NAME).write_bytes(CONTENT)
    (folder / "config.json").write_text("{}")
    with StandInHub({ID: folder}) as hub:
        yield hub


@settings(max_examples=40, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(faults=st.lists(st.tuples(st.sampled_from(FAULTS), st.integers(1, SIZE)), max_size=8),
       stop_after=st.integers(0, 20))
def test_the_right_bytes_or_none(server, tmp_path, faults, stop_after):
    shutil.rmtree(tmp_path / "model", ignore_errors=True)
    shutil.rmtree(tmp_path / ".model.download", ignore_errors=True)
    left = list(faults)

    def answer(handler) -> None:
        fault, amount = left.pop(0) if left else (honest, 0)
        fault(handler, amount)

    server.answers[PATH] = answer
    hub = Hub("huggingface", server.url)
    plan = make_plan(hub, ID, local_dir=tmp_path / "model")
    for attempt in count():
        cancel = threading.Event()
        reports = iter(range(10_000))

        def report(progress, cancel=cancel, reports=reports, attempt=attempt):
            assert 0 <= progress.done <= progress.total
            if next(reports) == stop_after and attempt == 0:
                cancel.set()

        try:
            folder = fetch(hub, plan, report, cancel, pause=lambda seconds: False,
                           clock=count().__next__)
            break
        except HubError:
            assert not Path(plan.target).exists()
            assert attempt <= len(faults) + 1  # it comes to an end when the faults do
    assert (folder / NAME).read_bytes() == CONTENT
