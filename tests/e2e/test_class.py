"""A class in real browsers: its host and two students, one on a phone in Chinese."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from backend.classroom import Classroom
from backend.compare import ComparisonRoom, Side
from backend.engine_manager import EngineManager
from backend.jobs import JobStore
from backend.model_library import ModelLibrary
from backend.services import Services
from tests.e2e.chat_page import ChatPage
from tests.e2e.fake_chat import FakeChat, Script, serve

STUDENT_KEY, HOST_KEY = "students-key", "hosts-only-key"
HOSTS_TABS = ("Guide", "Download", "Quantize", "Config", "Jobs", "Class")
PHONE = {"width": 390, "height": 844}
Login = Callable[..., ChatPage]


class Room(ComparisonRoom):
    """What is served is the scripted model."""

    def __init__(self, model: FakeChat) -> None:
        super().__init__()
        self.model = model

    def served_side(self) -> Side:
        return Side("fake-model", self.model)


@pytest.fixture(scope="module")
def model() -> FakeChat:
    return FakeChat()


@pytest.fixture(scope="module")
def url(model: FakeChat, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("class")
    services = Services(
        model, engines=EngineManager(), jobs=JobStore(folder / "jobs"),
        library=ModelLibrary(folder, [folder]), classroom=Classroom(has_hosts=True),
        comparisons=Room(model))
    with serve(services, api_keys=(STUDENT_KEY,), host_keys=(HOST_KEY,)) as url:
        yield url


@pytest.fixture(scope="module")
def login(browser: Browser, url: str) -> Iterator[Login]:
    """A function that comes in as a new person."""
    contexts, people = [], []

    def come(name: str, key: str = STUDENT_KEY, **options: object) -> ChatPage:
        contexts.append(browser.new_context(**{"locale": "en-US", **options}))
        page = contexts[-1].new_page()
        page.goto(url)  # shows the form
        people.append(ChatPage(page, url))
        page.locator("#key").fill(key)
        page.locator("#name").fill(name)
        page.locator("button").click()
        opened = page.locator("#turn-stats [data-lines]")
        expect(opened).to_be_attached(timeout=120_000)  # three pages, on a busy machine
        return people[-1]

    yield come
    for context in contexts:
        context.close()
    for person in people:
        assert person.foreign_requests() == []
        # 401 before and after they are in; 422 is Gradio's, cancelling an event without an id.
        assert [p for p in person.problems if "401" not in p and "422" not in p] == []


@pytest.fixture(scope="module")
def host(login: Login) -> ChatPage:
    return login("Ms Host", HOST_KEY)


@pytest.fixture(scope="module")
def ada(login: Login) -> ChatPage:
    return login("Ada <b>")


@pytest.fixture(scope="module")
def lilei(login: Login) -> ChatPage:
    return login("李雷", locale="zh-CN", viewport=PHONE)


def dashboard(host: ChatPage) -> Page:
    tab = host.page.get_by_role("tab", name="Class")
    tab.click()
    expect(host.page.locator("#class-people table")).to_be_visible()
    return host.page


def row(page: Page, name: str):
    return page.locator("#class-people tbody tr").filter(has_text=name)


def test_a_student_sees_the_chat_and_nothing_of_the_hosts(
    ada: ChatPage, lilei: ChatPage, host: ChatPage
) -> None:
    for name in HOSTS_TABS:
        expect(host.page.get_by_role("tab", name=name)).to_be_visible()
    expect(host.page.locator("#models-button")).to_be_visible()
    for student, titles, name in (
            (ada, ["Chat", "Compare"], "Ada <b>"), (lilei, ["对话", "对比"], "李雷")):
        expect(student.page.get_by_role("tab")).to_have_text(titles)
        expect(student.page.locator("#models-button")).to_have_count(0)
        expect(student.page.locator("#me")).to_contain_text(name)
        student.send("hello")
        assert "hello" in student.wait_reply(1)
    scrolled = "document.documentElement.scrollWidth > innerWidth"
    assert not lilei.page.evaluate(scrolled)


def test_a_student_compares_what_is_served(lilei: ChatPage, model: FakeChat) -> None:
    page = lilei.page
    page.get_by_role("tab", name="对比").click()
    for hidden in ("compare-left-target", "benchmark-section", "perplexity-section"):
        expect(page.locator(f"#{hidden}")).to_have_count(0)
    page.locator("#compare-prompt textarea").fill("两边")
    page.locator("#compare-prompt textarea").press("Enter")
    for side in ("left", "right"):
        expect(page.locator(f"#pane-{side}-head")).to_contain_text("fake-model")
        expect(page.locator(f"#pane-{side}-reply")).to_contain_text("You said 两边")
    expect(page.locator("#compare-note")).to_contain_text("两边是同一个模型")
    expect(page.locator("button#compare-markdown")).to_be_visible()
    expect(page.locator("button#compare-free")).to_have_count(0)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    expect(page.locator(".toast-body")).to_have_count(0)
    page.get_by_role("tab", name="对话").click()


def test_the_host_sees_who_is_here_and_what_they_do(
    host: ChatPage, ada: ChatPage, lilei: ChatPage, model: FakeChat
) -> None:
    page = dashboard(host)
    expect(page.locator('[data-figure="here"] strong')).to_have_text("2")
    expect(row(page, "Ms Host")).to_contain_text("you")
    script = model.scripts["long"] = Script(["one ", "two"], hold_at=1)
    ada.send("long")
    expect(row(page, "Ada <b>").locator("td").nth(1)).to_have_text("1")  # by itself
    script.go.set()
    ada.wait_idle()
    expect(row(page, "Ada <b>").locator("td").nth(1)).to_have_text("0")
    expect(row(page, "李雷").locator("td").nth(2)).to_have_text("3")  # a chat's, a comparison's
    invitation = page.locator("#class-text textarea")
    for part in ("ssh -CNL ", host.url, STUDENT_KEY):
        assert part in invitation.input_value()
    assert HOST_KEY not in page.content() + invitation.input_value()


def test_a_pause_is_told_to_students_and_ends(
    host: ChatPage, ada: ChatPage, lilei: ChatPage
) -> None:
    page = dashboard(host)
    page.locator("button#class-pause").press("Enter")
    expect(page.locator("#class-summary")).to_contain_text("The class is paused")
    expect(ada.page.locator("#status-bar")).to_contain_text("Class paused")
    expect(lilei.page.locator("#status-bar")).to_contain_text("课堂已暂停")
    lilei.send("等一下")
    expect(lilei.toast).to_contain_text("主持人暂停了课堂")
    expect(lilei.box).to_have_value("等一下")  # not lost
    ada.send("wait")
    expect(ada.toast).to_contain_text("The host has paused the class.")
    page.locator("button#class-resume").press("Enter")
    expect(page.locator("#class-summary")).to_contain_text("The class is open")
    expect(ada.page.locator("#status-bar")).not_to_contain_text("Class paused")
    before = len(lilei.turns())
    lilei.box.press("Enter")
    assert "等一下" in lilei.wait_reply(before + 1)


def test_limits_hold_for_each_student(host: ChatPage, ada: ChatPage, model: FakeChat) -> None:
    page = dashboard(host)

    def apply(replies: str, tokens: str) -> None:
        page.locator("#class-max-replies input").fill(replies)
        page.locator("#class-max-tokens input").fill(tokens)
        page.locator("button#class-save").click()

    apply("0", "")
    expect(host.toast).to_contain_text("Replies at a time must be a whole number from 1 to 256")
    apply("1", "16")
    expect(host.toast).to_contain_text("The limits hold")
    ada.new_chat()
    script = model.scripts["first"] = Script(["one ", "two"], hold_at=1)
    ada.send("first")
    expect(ada.live).to_contain_text("one")
    assert model.sampling[-1].max_tokens == 16
    ada.new_chat()
    ada.send("second")
    expect(ada.toast).to_contain_text("You have as many replies open as you may")
    script.go.set()
    apply("4", "")
    expect(page.locator("#class-max-tokens input")).to_have_value("")


def test_the_dashboard_on_a_phone(login: Login, ada: ChatPage) -> None:
    page = login("林老师", HOST_KEY, locale="zh-CN", viewport=PHONE).page
    page.get_by_role("tab", name="课堂").click()
    people = page.locator("#class-people .lmd-people")
    expect(people).to_contain_text("Ada <b>")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    # What a thumb is to reach: within the screen's width, and nothing over it.
    for id in ("class-pause", "class-max-replies input", "class-max-tokens input", "class-save",
               "class-text button"):
        part = page.locator(f"#{id}").first
        part.scroll_into_view_if_needed()
        part.click(trial=True)
        box = part.bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"], id
    # The table is wider, and goes to and fro by itself, by keys too.
    people.focus()
    page.keyboard.press("End")
    last = people.locator("thead th").last
    last.scroll_into_view_if_needed()
    box = last.bounding_box()
    assert box and box["x"] + box["width"] <= PHONE["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_another_students_chat_is_not_to_be_had_by_its_id(ada: ChatPage, lilei: ChatPage) -> None:
    kept = "Object.entries(sessionStorage).find(([k]) => k.endsWith('.conversation'))"
    key, id = lilei.page.evaluate(kept)
    ada.page.evaluate("([key, id]) => sessionStorage.setItem(key, id)", [key, id])
    ada.reload()
    assert ada.turns() == []
    assert "hello" in lilei.turns()[0][0]


def test_logging_out_ends_it(ada: ChatPage, url: str) -> None:
    ada.page.get_by_role("button", name="Log out").click()
    expect(ada.page.locator("#key")).to_be_visible()
    assert ada.page.goto(url).status == 401
    ada.left()
