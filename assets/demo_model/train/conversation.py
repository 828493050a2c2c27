"""A conversation as data, and its ChatML text."""

from __future__ import annotations

from dataclasses import dataclass, field

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"


@dataclass(frozen=True)
class Message:
    """One message; ``role`` is system, user or assistant."""

    role: str
    content: str


@dataclass
class Conversation:
    """Messages in order; a system message, if any, first, then user and assistant by turns."""

    messages: list[Message] = field(default_factory=list)

    def say(self, question: str, answer: str) -> None:
        """Adds one turn."""
        self.messages.append(Message("user", question))
        self.messages.append(Message("assistant", answer))

    def text(self) -> str:
        """What the chat template renders (a test compares the two)."""
        return "".join(f"{IM_START}{m.role}\n{m.content}{IM_END}\n" for m in self.messages)
