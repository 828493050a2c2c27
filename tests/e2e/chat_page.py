"""What a person does on the chat page, for tests."""

from __future__ import annotations

import re

from playwright.sync_api import Locator, Page, expect


class ChatPage:
    """Actions and sights of the chat page.

    Args:
        page: a page of a browser, not opened yet.
        url: of the server.
    """

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.requests: list[str] = []
        self.problems: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", lambda message: message.type == "error"
                and self.problems.append(message.text))

    @property
    def box(self) -> Locator:
        return self.page.locator("#message textarea")

    @property
    def live(self) -> Locator:
        return self.page.locator("#live")

    @property
    def toast(self) -> Locator:
        return self.page.locator(".toast-body").last

    def open(self) -> ChatPage:
        """Go to the page and wait until it can be used."""
        self.page.goto(self.url)
        return self.wait_open()

    def reload(self) -> ChatPage:
        """Reload the page."""
        self.page.reload()
        self.wait_open()
        return self.left()

    def left(self) -> ChatPage:
        """Gradio's own complaint about a stream that leaving the page has broken is no problem."""
        ends = ("AbortError", "errored out")
        self.problems = [p for p in self.problems if not any(end in p for end in ends)]
        return self

    def wait_open(self) -> ChatPage:
        expect(self.page.locator("#turn-stats [data-lines]")).to_be_attached()  # by its load event
        return self

    def send(self, message: str) -> None:
        """Type a message and press Enter."""
        self.box.fill(message)
        self.box.press("Enter")

    def wait_reply(self, number: int, timeout_s: float = 60) -> str:
        """Wait until `number` turns are finished; the text of the last reply."""
        expect(self.page.locator("#chat .bot-row")).to_have_count(number, timeout=timeout_s * 1000)
        self.wait_idle(timeout_s)
        return self.turns()[-1][1]

    def wait_idle(self, timeout_s: float = 60) -> None:
        """Wait until no reply is being written."""
        expect(self.page.locator("button#send")).to_be_visible(timeout=timeout_s * 1000)

    def stop(self) -> None:
        self.page.locator("button#stop").click()

    def new_chat(self) -> None:
        self.page.locator("button#new-chat").click()
        expect(self.page.locator("#chat .user-row")).to_have_count(0)

    def chats(self) -> list[str]:
        """Titles in the list of chats."""
        return [choice.inner_text().strip()
                for choice in self.page.locator("#chat-choices label").all()]

    def open_chat(self, title: str) -> None:
        """Open a chat from the list."""
        self.page.locator("#chat-choices label").filter(has_text=title).click()
        expect(self.title).to_have_value(title)

    @property
    def title(self) -> Locator:
        return self.page.locator("#chat-title input, #chat-title textarea")

    def retry(self) -> None:
        self.page.locator('#chat button[aria-label="Retry"]').click()

    def undo(self) -> None:
        self.page.locator('#chat button[aria-label="Undo"]').click()

    def edit(self, turn: int, message: str) -> None:
        """Replace the user's message of turn `turn` (from 0)."""
        self.page.locator('#chat button[aria-label="Edit"]').nth(turn).click()
        self.page.locator("#chat textarea").fill(message)
        self.page.locator('#chat button[aria-label="Submit"]').click()

    def set_sampling(self, name: str, value: str) -> None:
        """Type into the field of a sampling setting."""
        field = self.page.locator(f"#sampling-{name} input")
        field.fill(value)
        field.press("Tab")

    def set_remote(self, url: str) -> None:
        """Restful mode: type a server's URL and connect."""
        self.page.locator("#remote-url textarea, #remote-url input").fill(url)
        self.page.locator("button#remote-connect").click()

    def turns(self) -> list[tuple[str, str]]:
        """(user's message, reply) of the finished turns, as plain text."""
        def texts(role: str) -> list[str]:
            rows = self.page.locator(f"#chat .{role}-row .flex-wrap").all()
            return [row.inner_text().strip() for row in rows]
        return list(zip(texts("user"), texts("bot"), strict=False))

    def stats(self) -> list[str]:
        """The line under each reply."""
        return [row.get_attribute("data-stats") or ""
                for row in self.page.locator("#chat .bot-row").all()]

    def context_tokens(self) -> int:
        """The context meter's count."""
        text = self.page.locator("#meter").inner_text()
        match = re.search(r"\d+", text)
        assert match, f"no number in the context meter: {text!r}"
        return int(match[0])

    def status(self) -> str:
        """The text of the status bar."""
        return self.page.locator("#status-bar").inner_text()

    def foreign_requests(self) -> list[str]:
        """Requests that left this machine; there must be none."""
        local = ("http://127.0.0.1", "data:", "blob:")
        return [url for url in self.requests if not url.startswith(local)]
