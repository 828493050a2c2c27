"""What students may call of the page: each of its events, and Gradio's other routes, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from backend.classroom import Caller, Classroom, Role, StudentLimits
from backend.engine_manager import EngineManager
from backend.jobs import JobStore
from backend.model_library import ModelLibrary
from backend.services import Services
from tests.e2e.fake_chat import FakeChat, serve
from ui import build
from ui.roles import UNASKED, Page

STUDENT_KEY, HOST_KEY = "student-key", "hosts-only-key"
CLASS = {"api_keys": (STUDENT_KEY,), "host_keys": (HOST_KEY,)}
NOTHING = {"__type__": "update"}  # what Gradio takes for no change
REFUSAL = "Only the host of this class may do that."

# All that a student may call; whoever adds to it has asked what a student could do with it.
OPEN_TO_STUDENTS = {
    "ChatActions.on_delete", "ChatActions.on_delete_preset", "ChatActions.on_leave_full",
    "ChatActions.on_list", "ChatActions.on_more", "ChatActions.on_open", "ChatActions.on_preset",
    "ChatActions.on_rename", "ChatActions.on_save_preset", "ChatActions.on_shown",
    "ChatActions.on_version", "ChatActions.on_code", "ChatActions.on_export", "ChatTab.on_drop",
    "ChatTab.on_edit", "ChatTab.on_example", "ChatTab.on_go_on", "ChatTab.on_resume",
    "ChatTab.on_retry",
    "ChatTab.on_send", "ChatTab.on_show", "ChatTab.on_stop", "ChatTab.on_undo",
    "SideBySide.on_choices", "SideBySide.on_draw", "SideBySide.on_end", "SideBySide.on_go",
    "SideBySide.on_json", "SideBySide.on_leave", "SideBySide.on_markdown", "SideBySide.on_stop",
    "StatusBar.on_load", "TargetPicker.on_choices", "TargetPicker.on_target",
}
IN_RESTFUL_MODE = {"RemotePanel.on_connect"}


@dataclass
class Class:
    """A page with every tab that there is, and who talks to it."""

    url: str
    page: Page
    services: Services

    def __post_init__(self) -> None:
        self.student, self.host = self.client(STUDENT_KEY), self.client(HOST_KEY)

    def client(self, key: str) -> httpx.Client:
        return httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=60)

    def call(self, client: httpx.Client, name: str, data: list[Any]) -> dict[str, Any]:
        """An event by its handler's name, the last of them; its end."""
        number = max(n for n, e in self.page.fns.items() if name_of(e) == name)
        return finished(client, {number: data})[number]


def name_of(event: Any) -> str:
    """Of its handler; "" if there is none, because it happens in the browser alone."""
    return event.fn.__qualname__ if event.fn else ""


def finished(client: httpx.Client, calls: dict[int, list[Any]]) -> dict[int, dict[str, Any]]:
    """Send events to the queue, as the page does; their ends, by their numbers."""
    ids, ends = {}, {}
    for number, data in calls.items():
        answer = client.post("gradio_api/queue/join", json={
            "fn_index": number, "data": data, "session_hash": "by-hand"})
        assert answer.status_code == 200, answer.text
        ids[answer.json()["event_id"]] = number
    with client.stream("GET", "gradio_api/queue/data?session_hash=by-hand") as stream:
        for line in stream.iter_lines():
            message = json.loads(line[5:]) if line.startswith("data:") else {}
            if message.get("msg") == "process_completed":
                ends[ids[message["event_id"]]] = message
            if len(ends) == len(ids):
                break
    return ends


@contextmanager
def opened(services: Services) -> Iterator[Class]:
    """A class over these services."""
    pages: list[Page] = []
    build_ui = build.build_ui
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "build_ui", lambda s: pages.append(build_ui(s)) or pages[-1])
        with serve(services, **CLASS) as url:
            yield Class(url, pages[-1], services)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Class]:
    folder = tmp_path_factory.mktemp("class")
    with opened(Services(
        FakeChat(), engines=EngineManager(), jobs=JobStore(folder / "jobs"),
        library=ModelLibrary(folder, [folder]), classroom=Classroom(has_hosts=True),
    )) as made:
        yield made


def handled(page: Page) -> dict[int, Any]:
    """The events that have a handler."""
    return {number: event for number, event in page.fns.items() if event.fn}


def test_students_events_are_those_of_the_list(made: Class) -> None:
    events = handled(made.page)
    assert {name_of(events[n]) for n in made.page.student_events & set(events)} == OPEN_TO_STUDENTS
    assert {"ModelPanel.on_load", "DownloadTab.on_start", "ClassTab.on_pause",
            "SideBySide.on_force", "SideBySide.on_free", "BenchmarkPanel.on_start",
            "PerplexityPanel.on_start"} <= {name_of(event) for event in events.values()}


def test_every_other_event_is_refused(made: Class) -> None:
    others = {number: [None] * len(event.inputs) for number, event in handled(made.page).items()
              if number not in made.page.student_events}
    assert len(others) > 30
    for number, end in finished(made.student, others).items():
        event = made.page.fns[number]
        if UNASKED & {trigger for _, trigger in event.targets}:  # not run, and nobody to be told
            assert end["output"]["data"] == [NOTHING] * len(event.outputs)
            continue
        assert not end["success"], name_of(event)
        assert end["output"]["error"] == REFUSAL
    direct = [number for number in others if not made.page.fns[number].queue]
    assert direct  # they have a second way in, past the queue
    for number in direct:
        answer = made.student.post("gradio_api/run/predict", json={
            "fn_index": number, "data": others[number], "session_hash": "by-hand"}).json()
        assert answer.get("error") == REFUSAL or set(map(str, answer["data"])) == {str(NOTHING)}
    assert not made.services.classroom.paused and not made.services.jobs.list()


def test_a_host_may_call_them(made: Class) -> None:
    assert made.call(made.host, "ClassTab.on_pause", [])["success"]
    assert made.services.classroom.paused
    assert made.call(made.host, "ClassTab.on_resume", [])["success"]
    assert not made.services.classroom.paused


@pytest.mark.parametrize("replies, tokens", [
    (0, None), (257, None), (1.5, None), (2, 0), ("many", None), (None, None), (2, "long")])
def test_limits_out_of_range_change_nothing(made: Class, replies: Any, tokens: Any) -> None:
    made.call(made.host, "ClassTab.on_save", [replies, tokens])
    assert made.services.classroom.student_limits == StudentLimits()


@pytest.mark.parametrize("method, path", [
    ("POST", "gradio_api/upload"), ("GET", "gradio_api/upload_progress?upload_id=x"),
    ("GET", "gradio_api/file=/etc/hostname"), ("GET", "gradio_api/file/etc/hostname"),
    ("GET", "gradio_api/file=http://127.0.0.1:1/"), ("GET", "gradio_api/proxy=http://127.0.0.1"),
    ("POST", "gradio_api/component_server"), ("POST", "gradio_api/process_recording"),
    ("POST", "gradio_api/call/on_pause"), ("POST", "gradio_api/call/v2/on_pause"),
    ("POST", "gradio_api/run/on_pause"), ("POST", "gradio_api/api/predict"),
    ("GET", "gradio_api/queue/status"), ("GET", "gradio_api/info"), ("GET", "monitoring"),
    ("GET", "monitoring/summary"), ("GET", "gradio_api/deep_link?session_hash=x"),
    ("POST", "gradio_api/vibe-edit"), ("GET", "gradio_api/openapi.json")])
def test_other_routes_of_gradios_are_refused(made: Class, method: str, path: str) -> None:
    answer = made.student.request(method, path)
    assert answer.status_code == 403 and REFUSAL in answer.text


def test_the_page_tells_students_nothing_of_the_server(made: Class) -> None:
    for path in ("", "config"):
        text = made.student.get(path).text
        assert HOST_KEY not in text and STUDENT_KEY not in text
        assert str(Path.home()) not in text and str(made.services.jobs.root) not in text


def test_nobody_comes_in_without_a_key(made: Class) -> None:
    answer = httpx.post(f"{made.url}gradio_api/queue/join", json={
        "fn_index": 0, "data": [], "session_hash": "x"})
    assert answer.status_code == 401


def test_a_student_cannot_read_anothers_chat_by_its_id(made: Class) -> None:
    chat = "0123456789abcdef" * 2

    def login(name: str) -> httpx.Client:
        client = httpx.Client(base_url=made.url, timeout=60)
        answer = client.post("login", data={"key": STUDENT_KEY, "name": name})
        assert answer.status_code == 303
        return client

    ada, grace = login("Ada"), login("Grace")
    event = next(e for e in made.page.fns.values() if name_of(e) == "ChatTab.on_send")
    form = [chat if block.elem_id == "conversation-id" else
            "a secret" if block.elem_id == "message" else getattr(block, "value", None)
            for block in event.inputs]
    assert finished(ada, {event._id: form})[event._id]["success"]

    def read_by(client: httpx.Client) -> str:
        return json.dumps(made.call(client, "ChatActions.on_open", [chat, "", 30, ""]))

    assert "a secret" in read_by(ada)
    assert "a secret" not in read_by(grace)
    assert "a secret" not in read_by(login("Ada"))  # to take her name is not to be her
    assert "a secret" not in read_by(made.student) and "a secret" not in read_by(made.host)
    made.call(grace, "ChatActions.on_delete", [chat])
    assert "a secret" in read_by(ada)


@pytest.fixture(scope="module")
def restful() -> Iterator[Class]:
    """A class over somebody's api_server."""
    services = Services(
        FakeChat(), default_url="http://127.0.0.1:23333", classroom=Classroom(has_hosts=True))
    with opened(services) as made:
        yield made


def compare(made: Class, **form: Any) -> str:
    """What is drawn of a student's comparison by hand; fields by their elem_id."""
    def student(name: str) -> int:
        return next(n for n in sorted(made.page.student_events)
                    if name_of(made.page.fns[n]) == f"SideBySide.{name}")

    go, draw, end = map(student, ("on_go", "on_draw", "on_end"))
    values = [form.get((block.elem_id or "").replace("-", "_"), block.value)
              for block in made.page.fns[go].inputs]
    finished(made.student, {go: values})
    drawn = finished(made.student, {draw: []})[draw]
    assert finished(made.student, {end: []})[end]["success"]
    return str(drawn["output"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("target", ["/etc", "server", None, ["served"]])
def test_students_compare_nothing_but_what_is_served(
    restful: Class, side: str, target: Any
) -> None:
    model: Any = restful.services.chat
    asked = len(model.seen)
    compare(restful, compare_prompt="Hello", **{
        f"compare_{side}_target": target, f"compare_{side}_url": restful.services.default_url})
    assert len(model.seen) == asked


def test_a_class_limits_its_comparisons_as_its_chats(restful: Class) -> None:
    model: Any = restful.services.chat
    classroom, asked = restful.services.classroom, len(model.seen)
    host = Caller("host", "", Role.HOST)
    classroom.set_limits(host, StudentLimits(max_replies=1, max_tokens=7))
    try:
        drawn = compare(restful, compare_prompt="Both", compare_right_model="other")
        assert drawn.count("You said **Both**") == 2, "one after the other, so both are answered"
        assert model.models_asked[asked:] == [None, "other"]
        assert [sampling.max_tokens for sampling in model.sampling[asked:]] == [7, 7]
        classroom.pause(host)
        assert compare(restful, compare_prompt="Now").count("has paused the class") == 2
        assert len(model.seen) == asked + 2
    finally:
        classroom.resume(host)
        classroom.set_limits(host, StudentLimits())


def test_a_student_is_shown_no_other_targets(made: Class) -> None:
    for client, others in ((made.student, False), (made.host, True)):
        end = made.call(client, "TargetPicker.on_choices", ["served"])
        assert ("server" in str(end["output"]["data"][0]["choices"])) == others


def test_a_student_has_no_server_but_the_operators(restful: Class) -> None:
    named = {name_of(e) for n, e in handled(restful.page).items()
             if n in restful.page.student_events}
    assert named == OPEN_TO_STUDENTS | IN_RESTFUL_MODE
    theirs = restful.services.default_url
    usual = restful.call(restful.student, "RemotePanel.on_connect", [theirs, ""])
    assert usual["output"]["data"][0]["value"] == "fake-model"
    for target in (["http://127.0.0.1:1", ""], [theirs, "a-key"]):
        end = restful.call(restful.student, "RemotePanel.on_connect", target)
        assert end["output"]["data"][0]["value"] is None
