"""What the chat tab draws: messages, the line under a reply, the context meter. Pure functions."""

from __future__ import annotations

import html
import json
import re
from typing import Any, NamedTuple

from backend.engine.types import EngineStats
from backend.history import Turn
from ui.conversations import Conversation
from ui.i18n import t

LATEX_DELIMITERS = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
NEARLY_FULL = 0.85  # of the context; from here on the meter warns


class ContextUse(NamedTuple):
    """Tokens of a prompt, and how many it and the reply may have together; None: not knowable."""

    tokens: int | None
    limit: int | None

    @property
    def nearly_full(self) -> bool:
        return bool(self.tokens and self.limit) and self.tokens >= NEARLY_FULL * self.limit


def split_reasoning(text: str) -> tuple[str, str]:
    """(thoughts, answer) of a reply that may begin with <think> ... </think>.

    Some templates begin the thoughts themselves, and the reply only ends them, on a line alone.
    """
    if match := re.match(r"\s*<think>", text):
        thoughts, _, answer = text[match.end():].partition("</think>")
        return thoughts.strip(), answer.strip()
    match = re.search(r"^</think>[ \t]*$", text, re.MULTILINE)
    if match and "<think>" not in text[:match.start()]:
        return text[:match.start()].strip(), text[match.end():].strip()
    return "", text


def chat_messages(
    conversation: Conversation, locale: str, *, keep: int | None = None, user: str | None = None
) -> list[dict[str, Any]]:
    """The Chatbot's value: the first `keep` turns (all of them), then `user` awaiting a reply."""
    messages: list[dict[str, Any]] = []
    for turn in conversation.turns[:keep]:
        messages += _turn_messages(turn, locale)
    return messages if user is None else [*messages, _message("user", user)]


def turn_of_message(conversation: Conversation, locale: str, index: int) -> int | None:
    """Which turn the Chatbot's message `index` belongs to; None if it shows something older."""
    for number, turn in enumerate(conversation.turns):
        index -= len(_turn_messages(turn, locale))
        if index < 0:
            return number
    return None


def _turn_messages(turn: Turn, locale: str) -> list[dict[str, Any]]:
    thoughts, answer = split_reasoning(turn.reply)
    messages = [_message("user", turn.user)]
    if thoughts:
        messages.append(_message("assistant", thoughts))
        messages[-1]["metadata"] = {"title": t("chat.reasoning", locale), "status": "done"}
    messages.append(_message("assistant", answer or t("chat.empty_reply", locale)))
    return messages


def _message(role: str, text: str) -> dict[str, Any]:
    # A plain string would lose its indentation: Gradio runs inspect.cleandoc over it.
    return {"role": role, "content": [{"type": "text", "text": text}]}


def waiting_html(seconds: float, stats: EngineStats | None, locale: str) -> str:
    """What stands in for a reply until its first token; with the engine's queue, if there is."""
    text = t("chat.waiting", locale, seconds=f"{seconds:.1f}")
    if stats and stats.num_waiting:
        text += " · " + t("chat.waiting_queue", locale, running=stats.num_running,
                          waiting=stats.num_waiting)
    return f'<span class="lmd-waiting">{html.escape(text)}</span>'


def stats_line(turn: Turn, locale: str) -> str:
    """Time to first token, speed, counts and how the reply ended, as one line of plain text."""
    parts = []
    if turn.stats is not None:
        stats = turn.stats
        parts.append(t("stats.ttft", locale, seconds=f"{stats.ttft_s:.2f}"))
        if stats.tokens_per_s:
            parts.append(t("stats.speed", locale, speed=f"{stats.tokens_per_s:.1f}"))
        parts.append(t("stats.counts", locale, prompt=stats.prompt_tokens,
                       reply=stats.completion_tokens))
        if stats.cached_tokens:
            parts.append(t("stats.cached", locale, cached=stats.cached_tokens))
    parts.append(t(f"stats.finish.{turn.finish_reason}", locale))
    return " · ".join(parts)


def stats_html(conversation: Conversation, locale: str) -> str:
    """The lines of all turns as data, which the page's script writes under the replies, and which
    version of its turn each reply is.

    Not inside the Chatbot's text: its copy button would copy them with the reply.
    """
    lines, versions = [], []
    for number, turn in enumerate(conversation.turns):
        line = stats_line(turn, locale)
        if number < conversation.dropped:
            line = f"{t('stats.dropped', locale)} · {line}"
        lines.append(line)
        ids = turn.versions if turn.id in turn.versions else []
        versions.append({"ids": ids, "at": ids.index(turn.id) if ids else 0})
    return f'<div data-lines="{_json(lines)}" data-versions="{_json(versions)}"></div>'


def _json(value: Any) -> str:
    """JSON for an attribute."""
    return html.escape(json.dumps(value, ensure_ascii=False))


def meter_html(use: ContextUse, locale: str) -> str:
    """The context meter; empty when the count is not knowable."""
    tokens, limit = use
    if tokens is None:
        return ""
    if not limit:
        return f'<div class="lmd-meter">{t("meter.tokens", locale, tokens=tokens)}</div>'
    full = use.nearly_full
    hint = t("meter.nearly_full" if full else "meter.hint", locale)
    text = t("meter.of", locale, tokens=tokens, limit=limit)
    return (
        f'<div class="lmd-meter{" lmd-full" if full else ""}" title="{html.escape(hint)}">'
        f'<span class="lmd-track"><span style="width:{min(tokens / limit, 1):.1%}"></span></span>'
        f"<span>{text}</span></div>"
    )
