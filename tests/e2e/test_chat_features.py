"""What can be done with chats on the page, in a real browser, over a scripted model."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, Route, expect

from backend.services import Services
from tests.e2e.chat_page import ChatPage
from tests.e2e.fake_chat import INFO, FakeChat, Script, serve

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


def ask(chat: ChatPage, *messages: str) -> None:
    for message in messages:
        number = len(chat.turns()) + 1
        chat.send(message)
        chat.wait_reply(number)


def download(page: Page, button: str) -> tuple[str, str]:
    """(file name, text) of what a button hands to the browser's downloads."""
    with page.expect_download() as waiting:
        page.locator(button).click()
    path = waiting.value.path()
    return waiting.value.suggested_filename, Path(path).read_text(encoding="utf-8")


def code(page: Page, kind: str, known_by: str) -> str:
    page.locator(f"#code-{kind}").click()
    shown = page.locator("#code .cm-content")
    expect(shown).to_contain_text(known_by)
    return "\n".join(line.inner_text() for line in page.locator("#code .cm-line").all())


def open_tools(page: Page) -> None:
    page.locator("#chat-tools > button").click()
    expect(page.locator("#export-json")).to_be_visible()


def test_chats_are_searched_renamed_and_deleted(chat: ChatPage) -> None:
    page = chat.page
    ask(chat, "about kangaroos")
    chat.new_chat()
    ask(chat, "关于量化的问题")
    expect(page.locator("#chat-choices label")).to_have_count(2)
    search = page.locator("#chat-search input, #chat-search textarea")
    for words, found in (("kangaroo", "about kangaroos"), ("量化的", "关于量化的问题")):
        search.fill(words)
        expect(page.locator("#chat-choices label")).to_have_text([found])
    search.fill("no such words")
    expect(page.locator("#no-chats")).to_be_visible()
    search.fill("")
    expect(page.locator("#chat-choices label")).to_have_count(2)

    chat.open_chat("about kangaroos")
    expect(page.locator("#chat .user-row")).to_have_text("about kangaroos")
    chat.title.fill("  Marsupials ")
    chat.title.press("Enter")
    expect(page.locator("#chat-choices label").filter(has_text="Marsupials")).to_be_visible()
    chat.reload()
    expect(chat.title).to_have_value("Marsupials")

    # Whoever says no and then yes waits for nothing between the two, however slow the server is.
    held: list[Route] = []
    slow = True

    def hold(route: Route) -> None:
        if slow:
            held.append(route)
        else:
            route.continue_()

    page.route("**/queue/join*", hold)
    page.once("dialog", lambda dialog: dialog.dismiss())
    page.locator("#delete-chat").click()
    page.once("dialog", lambda dialog: dialog.accept())
    page.locator("#delete-chat").click()
    expect(page.locator("#chat .user-row")).to_have_text("about kangaroos")  # still there
    slow = False
    for route in held:
        route.continue_()
    expect(page.locator("#chat .user-row")).to_have_count(0)
    expect(page.locator("#chat-choices label")).to_have_text(["关于量化的问题"])


def test_export_and_code(chat: ChatPage, model: FakeChat, url: str) -> None:
    page = chat.page
    model.scripts["export me"] = Script(["# Not a title\n", "```python\n    x = 1\n```"])
    page.locator("#system-prompt textarea").fill("Be brief.")
    chat.set_sampling("temperature", "0.3")
    ask(chat, "export me")
    open_tools(page)
    name, text = download(page, "#export-markdown")
    assert name == "export-me.md"
    assert text == ("# export me\n\n**System**\n\n> Be brief.\n\n## User\n\nexport me\n\n"
                    "## Assistant\n\n# Not a title\n```python\n    x = 1\n```\n")
    name, text = download(page, "#export-json")
    exported = json.loads(text)
    assert name == "export-me.json" and exported["sampling"]["temperature"] == 0.3
    assert [m["role"] for m in exported["messages"]] == ["system", "user", "assistant"]
    assert exported["messages"][2]["stats"]["completion_tokens"] == 2

    chat.box.fill("what's next?")
    words = shlex.split(code(page, "curl", "curl"))
    assert f"{url}v1/chat/completions" in words
    body = json.loads(words[-1])
    assert body["model"] == "fake-model" and body["temperature"] == 0.3
    assert [m["content"] for m in body["messages"]] == [
        "Be brief.", "export me", "# Not a title\n```python\n    x = 1\n```", "what's next?"]
    compile(program := code(page, "python", "import os"), "snippet", "exec")
    assert f"{url}v1" in program and "what's next?" in program
    line = code(page, "command_line", "python app.py chat")
    assert "--temperature 0.3" in line and "'Be brief.'" in line


def test_presets_of_ours_and_of_ones_own(chat: ChatPage) -> None:
    page = chat.page
    preset = page.locator("#preset input")
    temperature = page.locator("#sampling-temperature input")

    def choose(name: str) -> None:
        preset.click()
        page.get_by_role("option", name=name, exact=True).click()

    choose("Translator")
    expect(temperature).to_have_value("0.2")
    expect(page.locator("#system-prompt textarea")).to_have_value(re.compile("translator"))
    chat.set_sampling("temperature", "1.3")
    preset.fill("My own")
    preset.press("Enter")
    page.locator("#preset-save").click()
    expect(chat.toast).to_contain_text("saved")
    choose("Precise")
    expect(temperature).to_have_value("0.2")
    expect(page.locator("#system-prompt textarea")).to_have_value("")
    chat.reload()  # it is kept
    choose("My own")
    expect(temperature).to_have_value("1.3")
    page.locator("#preset-delete").click()
    expect(preset).to_have_value("")
    preset.click()
    expect(page.get_by_role("option", name="My own", exact=True)).to_have_count(0)
    preset.fill("Precise")
    preset.press("Enter")
    page.locator("#preset-save").click()
    expect(chat.toast).to_contain_text("not one of the built-in ones")


def test_reasoning_folds_while_and_after_it_is_written(chat: ChatPage, model: FakeChat) -> None:
    page = chat.page
    script = model.scripts["ponder"] = Script(
        ["<think>First this,", " then that.</think>", "The answer."], hold_at=1)
    chat.send("ponder")
    live = page.locator("#live-reasoning")
    expect(live).to_be_visible()
    expect(page.locator("#live-thoughts")).not_to_be_visible()  # folded
    page.locator("#toggle-thoughts").click()
    expect(page.locator("#live-thoughts")).to_contain_text("First this,")
    script.go.set()
    assert "The answer." in chat.wait_reply(1)
    expect(live).not_to_be_visible()
    thoughts = page.locator("#chat .bot-row").get_by_text("then that.")
    expect(thoughts).not_to_be_visible()
    page.locator("#chat .bot-row").get_by_text("Reasoning").click()
    expect(thoughts).to_be_visible()


def test_before_the_context_is_full_there_is_a_choice(
    chat: ChatPage, model: FakeChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    notice = chat.page.locator("#context-notice")
    ask(chat, "one " * 20, "two " * 20)
    monkeypatch.setattr(INFO, "session_len", 150)
    chat.send("three " * 20)
    expect(notice).to_contain_text("of 150 tokens of the context")
    assert len(chat.turns()) == 2 and "three" not in model.seen[-1][-1]["content"]
    notice.get_by_role("button", name="Drop the oldest turns").click()
    chat.wait_reply(3)
    expect(notice).not_to_be_visible()
    sent = [m["content"].split()[0] for m in model.seen[-1] if m["role"] == "user"]
    assert sent[-1] == "three" and "one" not in sent
    assert "no longer sent" in chat.stats()[0]

    four = "four " * 126
    chat.send(four)
    expect(notice).to_contain_text("does not fit")
    expect(notice.get_by_role("button", name="Go on")).not_to_be_visible()
    notice.get_by_role("button", name="New chat").click()
    expect(chat.page.locator("#chat .user-row")).to_have_count(0)
    expect(chat.box).to_have_value(four)  # it comes along
    chat.box.press("Enter")
    notice.get_by_role("button", name="Go on").click()
    chat.wait_reply(1)
    assert model.seen[-1][-1]["content"] == four


def test_the_language_is_switched_and_kept(chat: ChatPage) -> None:
    page = chat.page
    page.locator(".lmd-language").select_option("zh-CN")
    expect(page.locator("button#send")).to_have_text("发送")
    chat.wait_open()
    chat.send("  ")
    expect(chat.toast).to_contain_text("消息")
    page.reload()
    expect(page.locator("button#send")).to_have_text("发送")
    page.locator(".lmd-language").select_option("en")
    expect(page.locator("button#send")).to_have_text("Send")
    chat.wait_open()
    chat.problems.clear()  # the reloads broke streams off


def test_arrows_lead_to_the_other_versions_of_a_reply(chat: ChatPage, model: FakeChat) -> None:
    page = chat.page
    for number in ("one", "two", "three"):
        model.scripts["dice"] = Script([number])
        if number == "one":
            chat.send("dice")
        else:
            chat.retry()
        expect(page.locator("#chat .bot-row")).to_contain_text(number)
        chat.wait_idle()
    versions = page.locator(".lmd-versions")
    expect(versions).to_contain_text("Version 3 of 3")
    expect(versions.get_by_role("button", name="Next version")).to_be_disabled()
    versions.get_by_role("button", name="Previous version").click()
    expect(versions).to_contain_text("Version 2 of 3")
    expect(page.locator("#chat .bot-row")).to_contain_text("two")
    ask(chat, "and then")
    assert [m["content"] for m in model.seen[-1]] == ["dice", "two", "and then"]
    versions.first.get_by_role("button", name="Next version").click()
    expect(page.locator("#chat .bot-row")).to_have_count(1)
    versions.get_by_role("button", name="Previous version").click()
    expect(page.locator("#chat .bot-row")).to_have_count(2)  # with what followed it


def test_a_cut_reply_goes_on_in_the_same_message(chat: ChatPage, model: FakeChat) -> None:
    page, resume = chat.page, chat.page.locator("button#resume")
    model.scripts["tell"] = Script(["Once upon a", " ti"], finish="length")
    ask(chat, "tell")
    expect(resume).to_be_visible()
    script = model.scripts["Once upon a ti"] = Script(["me there", " was an end."], hold_at=1)
    chat.box.fill("my draft")
    resume.click()
    expect(chat.live).to_have_text("Once upon a time there")
    expect(resume).not_to_be_visible()
    assert model.seen[-1] == [
        {"role": "user", "content": "tell"},
        {"role": "assistant", "content": "Once upon a ti", "prefix": True}]
    script.go.set()
    assert chat.wait_reply(1) == "Once upon a time there was an end."
    expect(resume).not_to_be_visible()
    expect(chat.box).to_have_value("my draft")
    expect(page.locator("#chat .user-row")).to_have_count(1)


def test_a_closed_tabs_reply_is_found_by_another(
    chat: ChatPage, model: FakeChat, url: str
) -> None:
    script = model.scripts["leave"] = Script(["The beginning,", " the end."], hold_at=1)
    chat.send("leave")
    expect(chat.live).to_contain_text("The beginning,")
    context = chat.page.context
    chat.page.close()
    other = ChatPage(context.new_page(), url).open()
    other.open_chat("leave")
    expect(other.live).to_contain_text("The beginning,")
    script.go.set()
    assert other.wait_reply(1) == "The beginning, the end."
    assert "leave" not in model.aborted and "complete" in other.stats()[0]


def test_html_of_a_reply_is_inert_while_and_after_it_is_written(
    chat: ChatPage, model: FakeChat
) -> None:
    evil = ('<img src="data:," onerror="window.hacked=1"><svg onload="window.hacked=2"></svg>'
            '<script>window.hacked=3</script><form action="/x"><input name="a"></form>'
            '<a href="javascript:window.hacked=4">link</a> <iframe srcdoc="x"></iframe>')
    script = model.scripts["attack"] = Script([f"<think>{evil}", f"</think>{evil} over", "."],
                                              hold_at=2)
    chat.send("attack")
    expect(chat.live).to_contain_text("over")
    bad = "script, iframe, [onerror], [onload], [href^=javascript]"
    for where in ("#live", "#live-thoughts"):
        assert chat.page.locator(where).locator(bad).count() == 0, where
    script.go.set()
    chat.wait_reply(1)
    assert chat.page.locator("#chat").locator(bad).count() == 0
    assert chat.page.evaluate("window.hacked") is None
    chat.problems.clear()  # pictures that are none
