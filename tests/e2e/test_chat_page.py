"""The chat page in a real browser, over a scripted model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Route, expect

from backend.errors import EngineDeadError, EngineNotReadyError
from backend.services import Services
from tests.e2e.chat_page import ChatPage
from tests.e2e.fake_chat import FakeChat, Script, serve
from tests.e2e.tunnel import tunnel_to
from ui import conversations

Open = Callable[..., ChatPage]


@pytest.fixture(scope="module")
def model() -> FakeChat:
    return FakeChat()


@pytest.fixture(scope="module")
def url(model: FakeChat) -> Iterator[str]:
    with serve(Services(model)) as url:
        yield url


@pytest.fixture
def chat(new_page: Open, url: str) -> Iterator[ChatPage]:
    page = new_page(url)
    yield page
    assert page.foreign_requests() == []
    assert page.problems == []


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that happens in the server."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_reply_streams_and_second_turn_sees_the_first(chat: ChatPage, model: FakeChat) -> None:
    script = model.scripts["streamed"] = Script(["The first half, ", "the second half."], hold_at=1)
    chat.send("streamed")
    expect(chat.live).to_contain_text("The first half,")
    assert chat.page.locator("#chat .bot-row").count() == 0
    script.go.set()
    assert chat.wait_reply(1) == "The first half, the second half."
    expect(chat.live).to_have_text("")
    assert "first token 0.12 s" in chat.stats()[0] and "34.5 tokens/s" in chat.stats()[0]
    chat.send("and again")
    assert "and again" in chat.wait_reply(2)
    assert [(m["role"], m["content"]) for m in model.seen[-1]] == [
        ("user", "streamed"), ("assistant", "The first half, the second half."),
        ("user", "and again"),
    ]
    assert chat.context_tokens() > 10


def test_stop_in_the_middle_keeps_what_came(chat: ChatPage, model: FakeChat) -> None:
    model.scripts["long story"] = Script(["Once upon a time", " never"], hold_at=1)
    chat.send("long story")
    expect(chat.live).to_contain_text("Once upon a time")
    chat.stop()
    until(lambda: "long story" in model.aborted, "the request was not aborted")
    assert chat.wait_reply(1) == "Once upon a time"
    assert chat.stats() == ["stopped"]
    chat.send("next")
    chat.wait_reply(2)
    assert model.seen[-1][1] == {"role": "assistant", "content": "Once upon a time"}


def test_escape_stops_a_reply_that_has_not_begun(chat: ChatPage, model: FakeChat) -> None:
    model.scripts["prefill"] = Script(["never"], hold_at=0)
    chat.send("prefill")
    expect(chat.live).to_contain_text("Waiting for the first token")
    chat.page.keyboard.press("Escape")
    until(lambda: "prefill" in model.aborted, "the request was not aborted")
    chat.wait_idle()
    expect(chat.box).to_have_value("prefill")  # nothing came, so the message is back
    assert chat.turns() == []


def test_reload_shows_finished_turns_and_settings(chat: ChatPage, model: FakeChat) -> None:
    chat.page.locator("#system-prompt textarea").fill("Be brief.")
    chat.set_sampling("temperature", "0.3")
    chat.send("remember me")
    before = chat.wait_reply(1)
    stats = chat.stats()
    chat.reload()
    assert chat.turns() == [("remember me", before)]
    assert chat.stats() == stats
    expect(chat.page.locator("#system-prompt textarea")).to_have_value("Be brief.")
    expect(chat.page.locator("#sampling-temperature input")).to_have_value("0.3")
    chat.send("go on")
    chat.wait_reply(2)
    assert model.seen[-1][0] == {"role": "system", "content": "Be brief."}
    assert model.seen[-1][1]["content"] == "remember me"
    assert model.sampling[-1].temperature == 0.3
    assert model.sampling[-1].max_tokens == 512


def test_reload_in_the_middle_finds_the_reply_still_growing(
    chat: ChatPage, model: FakeChat
) -> None:
    script = model.scripts["half"] = Script(["half a reply", " and the rest"], hold_at=1)
    chat.send("half")
    expect(chat.live).to_contain_text("half a reply")
    chat.reload()
    expect(chat.live).to_contain_text("half a reply")
    expect(chat.page.locator("#chat .user-row")).to_have_text("half")
    script.go.set()
    assert chat.wait_reply(1) == "half a reply and the rest"
    assert "complete" in chat.stats()[0] and "half" not in model.aborted
    chat.send("next")
    chat.wait_reply(2)


def test_a_reply_that_ends_while_the_page_opens_is_shown(chat: ChatPage, model: FakeChat) -> None:
    script = model.scripts["ending"] = Script(["half a reply", " and the rest"], hold_at=1)
    chat.send("ending")
    expect(chat.live).to_contain_text("half a reply")
    held: list[Route] = []
    chat.page.route("**/page/reply/**", lambda route: held.append(route), times=1)
    chat.reload()  # shows the question, then asks for the reply
    script.go.set()
    for _ in range(3000):  # a minute at most
        if held and "ending" in model.ended:
            break
        chat.page.wait_for_timeout(20)
    held[0].continue_()
    assert chat.wait_reply(1) == "half a reply and the rest"


@pytest.mark.parametrize("meanwhile", [False, True], ids=["goes on", "ends meanwhile"])
def test_a_reply_is_found_again_when_the_tunnel_was_cut(
    new_page: Open, url: str, model: FakeChat, meanwhile: bool
) -> None:
    script = model.scripts["tunnel"] = Script(["half a reply", " and the rest"], hold_at=1)
    with tunnel_to(url) as tunnel:
        page = new_page(tunnel.url)
        page.send("tunnel")
        expect(page.live).to_contain_text("half a reply")
        with page.page.expect_request("**/page/reply/**"):
            tunnel.cut()
            if meanwhile:
                script.go.set()
        script.go.set()
        assert page.wait_reply(1, timeout_s=90) == "half a reply and the rest"
        page.send("go on")
        page.wait_reply(2)


def test_a_reply_is_shown_though_the_tunnel_lost_what_shows_it(
    new_page: Open, url: str, model: FakeChat
) -> None:
    script = model.scripts["lost"] = Script(["half a reply", " and the rest"], hold_at=1)
    with tunnel_to(url) as tunnel:
        page = new_page(tunnel.url)
        page.send("lost")
        expect(page.live).to_contain_text("half a reply")
        expect(page.page.locator("button#stop")).to_be_visible()  # all that Gradio waited for
        with page.page.expect_request("**/page/reply/**"):
            tunnel.cut()
        page.page.route("**/queue/data*", lambda route: None, times=1)  # as if it were open still
        script.go.set()
        assert page.wait_reply(1, timeout_s=90) == "half a reply and the rest"


def test_a_reply_found_again_can_be_stopped(chat: ChatPage, model: FakeChat) -> None:
    model.scripts["found"] = Script(["beginning", " never"], hold_at=1)
    chat.send("found")
    expect(chat.live).to_contain_text("beginning")
    chat.reload()
    expect(chat.page.locator("button#stop")).to_be_visible()
    chat.page.keyboard.press("Escape")
    assert chat.wait_reply(1) == "beginning"
    assert chat.stats() == ["stopped"] and "found" in model.aborted


def test_a_closed_tab_frees_the_engine_after_the_grace(
    new_page: Open, url: str, model: FakeChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversations, "GRACE_S", 0.5)
    model.scripts["abandoned"] = Script(["never"], hold_at=0)
    page = new_page(url)
    page.send("abandoned")
    expect(page.live).to_contain_text("Waiting")
    page.page.close()
    until(lambda: "abandoned" in model.aborted, "the request of the closed tab goes on")


def test_retry_edit_undo_new_chat(chat: ChatPage, model: FakeChat) -> None:
    model.scripts["dice"] = Script(["one"])
    chat.send("dice")
    assert chat.wait_reply(1) == "one"
    model.scripts["dice"] = Script(["two"])
    chat.retry()
    expect(chat.page.locator("#chat .bot-row")).to_contain_text("two")
    chat.wait_idle()
    assert chat.turns() == [("dice", "two")]
    chat.send("second")
    chat.wait_reply(2)

    chat.edit(0, "changed")
    assert chat.wait_reply(1) == "You said changed, and that is all."
    assert [user for user, _ in chat.turns()] == ["changed"]
    assert [m["content"] for m in model.seen[-1]] == ["changed"]

    chat.undo()
    expect(chat.box).to_have_value("changed")
    assert chat.turns() == []
    chat.box.press("Enter")
    chat.wait_reply(1)
    chat.new_chat()
    expect(chat.page.locator("#meter")).to_contain_text("0 / 200")
    chat.reload()
    assert chat.turns() == []


def test_several_browsers_do_not_wait_or_mix(
    new_page: Open, url: str, model: FakeChat
) -> None:
    names = ["alice", "bob", "carol"]
    scripts = {n: Script([f"{n} hears ", f"from {n}"], hold_at=1) for n in names}
    model.scripts.update(scripts)
    pages = {name: new_page(url) for name in names}
    for name, page in pages.items():
        page.send(name)
    for name, page in pages.items():  # all are being answered at the same time
        expect(page.live).to_contain_text(f"{name} hears")
    for name in reversed(names):
        scripts[name].go.set()
        assert pages[name].wait_reply(1) == f"{name} hears from {name}"
    assert {name: page.turns() for name, page in pages.items()} == {
        name: [(name, f"{name} hears from {name}")] for name in names}


@pytest.mark.parametrize(("field", "value", "sentence"), [
    ("temperature", "5", "temperature must be from 0.0 to 2.0, not 5."),
    ("max_tokens", "1.5", "max_tokens must be a whole number, not 1.5."),
    ("top_p", "", "top_p is empty: a number is needed"),
])
def test_bad_settings_keep_the_message(
    chat: ChatPage, field: str, value: str, sentence: str
) -> None:
    chat.set_sampling(field, value)
    chat.send("a precious text")
    expect(chat.toast).to_contain_text(sentence)
    expect(chat.box).to_have_value("a precious text")
    assert chat.turns() == []


def test_empty_message(chat: ChatPage) -> None:
    chat.send("   ")
    expect(chat.toast).to_contain_text("The message is empty.")


def test_errors_are_sentences_and_lose_nothing(chat: ChatPage, model: FakeChat) -> None:
    model.scripts["early"] = Script(
        [], error=EngineNotReadyError("The model is still <b>loading</b>.", "Try again soon."))
    chat.send("early")
    expect(chat.toast).to_contain_text("The model is still <b>loading</b>. Try again soon.")
    expect(chat.box).to_have_value("early")

    model.scripts["late"] = Script(
        ["What came"], error=EngineDeadError("The engine stopped.", "Send it again."))
    chat.send("late")
    assert chat.wait_reply(1) == "What came"
    expect(chat.toast).to_contain_text("The engine stopped. Send it again.")
    assert chat.stats() == ["interrupted by an error"]

    model.scripts["bug"] = Script([], error=RuntimeError("secret detail"))
    chat.send("bug")
    expect(chat.toast).to_contain_text("Something went wrong inside LMDesk.")
    assert "secret detail" not in chat.page.content()
    expect(chat.box).to_have_value("bug")
    chat.send("still alive?")
    assert "still alive?" in chat.wait_reply(2)


def test_html_in_messages_is_inert(chat: ChatPage, model: FakeChat) -> None:
    evil = ('<img src=x onerror="window.hacked=1"><script>window.hacked=2</script>'
            '<a href="javascript:window.hacked=3">link</a><iframe srcdoc="x"></iframe>')
    model.scripts[evil] = Script([evil, " end of it"], hold_at=1)
    chat.send(evil)
    until(lambda: len(model.seen) > 0 and model.seen[-1][-1]["content"] == evil, "not sent")
    model.scripts[evil].go.set()
    chat.wait_reply(1)
    chat.page.locator("#chat .bot-row").get_by_text("end of it").wait_for()
    assert chat.page.evaluate("window.hacked") is None
    assert chat.page.locator("#chat script, #chat iframe, #chat [onerror]").count() == 0
    assert chat.page.locator('#chat a[href^="javascript"]').count() == 0
    chat.problems.clear()  # the picture "x" does not exist


def test_reasoning_is_folded_and_code_keeps_its_shape(chat: ChatPage, model: FakeChat) -> None:
    model.scripts["think"] = Script(
        ["<think>Hmm.</think>", "```python\n", "    indented = 1\n", "```\n$$x^2$$"])
    chat.send("think")
    reply = chat.wait_reply(1)
    assert "Reasoning" in reply and "<think>" not in reply
    assert "    indented = 1" in chat.page.locator("#chat pre code").inner_text()
    assert chat.page.locator("#chat .katex").count() > 0
    chat.edit(0, "plain")
    expect(chat.page.locator("#chat .bot-row")).to_contain_text("You said plain")


def test_example_question_is_sent(chat: ChatPage, model: FakeChat) -> None:
    chat.box.fill("my draft")
    chat.page.get_by_role("button", name="What is the KV cache?").click()
    chat.wait_reply(1)
    assert model.seen[-1][-1]["content"] == "What is the KV cache?"
    expect(chat.box).to_have_value("my draft")


def test_status_bar_and_its_states(chat: ChatPage, model: FakeChat) -> None:
    bar = chat.page.locator("#status-bar")
    for words in ("fake-model", "Ready", "1 running · 0 waiting", "KV cache 25 % of 25.0 MB",
                  "Memory 6.0 GB of 16.0 GB"):
        expect(bar).to_contain_text(words)
    model.state = "restarting"
    try:
        expect(bar).to_contain_text("Restarting")
    finally:
        model.state = "ready"
    expect(bar).to_contain_text("Ready")


def test_phone_screen(new_page: Open, url: str) -> None:
    page = new_page(url, viewport={"width": 390, "height": 844}, has_touch=True)
    page.send("A message that is long enough to need more than one line on a phone's screen")
    page.wait_reply(1)
    for name in ("Send", "Chats"):
        expect(page.page.get_by_role("button", name=name, exact=True)).to_be_in_viewport(ratio=1)
    assert page.page.evaluate("document.documentElement.scrollWidth") == 390
    page.set_sampling("temperature", "0.2")  # the settings are below the chat
    expect(page.page.locator("#sampling-temperature")).to_be_in_viewport()


def test_keyboard_alone_is_enough(chat: ChatPage) -> None:
    chat.page.keyboard.type("typed at once")  # the message box has the focus
    chat.page.keyboard.press("Tab")
    expect(chat.page.get_by_role("button", name="Send", exact=True)).to_be_focused()
    chat.page.keyboard.press("Enter")
    chat.wait_reply(1)


def test_secrets_and_turns_are_not_left_in_the_browser(chat: ChatPage) -> None:
    chat.send("confidential words")
    chat.wait_reply(1)
    stored = json.dumps(chat.page.evaluate("[{...localStorage}, {...sessionStorage}]"))
    assert "confidential" not in stored
