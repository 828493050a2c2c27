"""What the compare tab draws of a comparison, and the files that it becomes. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from backend.chat import ReplyStats
from backend.compare import Comparison, Pane
from ui.answer import sentence
from ui.chat_view import split_reasoning
from ui.i18n import t

Record = dict[str, Any]  # a comparison as plain data; what `record` makes


def head_html(pane: Pane, locale: str) -> str:
    """Who answers, and what it is doing."""
    state = end_of(pane) if pane.state == "ended" else pane.state
    words = t(f"compare.state.{state}", locale)
    return (f'<div class="lmd-pane-head"><strong>{escape(pane.side.name)}</strong>'
            f'<span class="lmd-pill" data-state="{state}" role="status">{escape(words)}</span>'
            "</div>")


def end_of(pane: Pane) -> str:
    """How its reply ended: "stop", "length", "stopped" or "failed"."""
    if pane.error is not None:
        return "failed"
    reason = pane.live.finish_reason if pane.live else None
    return reason or "stopped"


def reply_markdown(pane: Pane) -> str:
    """The reply; what the model thinks before it stands as a quotation."""
    thoughts, answer = split_reasoning(pane.live.text if pane.live else "")
    quoted = "\n".join(f"> {line}" for line in thoughts.splitlines())
    return "\n\n".join(filter(None, (quoted, answer)))


def foot_html(pane: Pane, locale: str) -> str:
    """Time to first token, speed and tokens; or what went wrong."""
    parts = []
    if stats := pane.live.so_far if pane.live else None:
        cells = {
            "ttft": t("compare.seconds", locale, seconds=f"{stats.ttft_s:.2f}"),
            "speed": f"{stats.tokens_per_s:.1f}" if stats.tokens_per_s else "–",
            "tokens": str(stats.completion_tokens),
        }
        parts = [f"<div><dt>{escape(t(f'compare.{name}', locale))}</dt>"
                 f'<dd data-figure="{name}">{escape(cell)}</dd></div>'
                 for name, cell in cells.items()]
    figures = f'<dl class="lmd-metrics">{"".join(parts)}</dl>' if parts else ""
    if pane.state == "ended" and pane.error is not None:
        words = escape(sentence(pane.error, locale))
        figures += f'<p class="lmd-problem" role="alert">{words}</p>'
    return figures


def note_html(comparison: Comparison, locale: str) -> str:
    """Whether both answer at once, and what else is to be known, in plain words."""
    plan, sampling = comparison.plan, comparison.sampling
    left, right = (pane.side for pane in comparison.panes)
    way = "together" if plan.together else "in_turn"
    notes = {
        f"compare.{way}": True,
        "compare.little_memory": not plan.together and plan.needs,
        "compare.one_reply": not plan.together and not plan.needs,
        "compare.evicts": plan.evicts,
        "compare.alike": left == right and (not sampling.temperature or sampling.seed is not None),
    }
    words = " ".join(t(key, locale) for key, holds in notes.items() if holds)
    return f'<p class="lmd-quiet" data-way="{way}">{escape(words)}</p>'


def record(comparison: Comparison, created: str) -> Record:
    """A finished comparison, to be taken along.

    Args:
        created: date and time.
    """
    system = [m["content"] for m in comparison.messages if m["role"] == "system"]
    sampling = comparison.sampling
    return {
        "created": created,
        "prompt": comparison.messages[-1]["content"],
        "system_prompt": system[0] if system else "",
        "sampling": {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens,
                     "seed": sampling.seed},
        "together": comparison.plan.together,
        "sides": [_side(pane) for pane in comparison.panes],
    }


def _side(pane: Pane) -> dict[str, Any]:
    stats = pane.live.so_far if pane.live else None
    load = pane.side.load
    return {
        "name": pane.side.name,
        "options": dict(load.options) if load else {},
        "reply": pane.live.text if pane.live else "",
        "ended": end_of(pane),
        "error": sentence(pane.error, "en") if pane.error is not None else None,
        "stats": asdict(stats) if stats else None,
    }


def as_json(made: Record) -> str:
    """For programs."""
    return json.dumps(made, ensure_ascii=False, indent=2) + "\n"


def as_markdown(made: Record, locale: str) -> str:
    """To read: the prompt, a table of figures, both replies."""
    sides: Sequence[dict[str, Any]] = made["sides"]
    way = t("compare.together" if made["together"] else "compare.in_turn", locale)
    names = [side["name"].replace("|", "\\|") for side in sides]
    stats = [ReplyStats(**side["stats"]) if side["stats"] else None for side in sides]
    rows = {
        "compare.ttft": [f"{s.ttft_s:.3f} s" if s else "–" for s in stats],
        "compare.speed": [f"{s.tokens_per_s:.1f}" if s and s.tokens_per_s else "–" for s in stats],
        "compare.tokens": [str(s.completion_tokens) if s else "–" for s in stats],
        "compare.ended": [t(f"compare.state.{side['ended']}", locale) for side in sides],
    }
    table = [f"| | {' | '.join(names)} |", "|---" * (len(sides) + 1) + "|",
             *(f"| {t(key, locale)} | {' | '.join(cells)} |" for key, cells in rows.items())]
    parts = [f"# {' – '.join(side['name'] for side in sides)}", f"{made['created']} · {way}"]
    if made["system_prompt"].strip():
        parts.append(f"**System**\n\n{_quoted(made['system_prompt'])}")
    parts += [_quoted(made["prompt"]), "\n".join(table)]
    parts += [f"## {side['name']}\n\n{side['reply'] or side['error'] or '–'}" for side in sides]
    return "\n\n".join(parts) + "\n"


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines())
