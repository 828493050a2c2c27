"""The class as HTML and text."""

from __future__ import annotations

from html import escape

from backend.classroom import Caller, ClassStatus, Invitation, PersonRow, Role
from ui.i18n import t

HERE_S = 30.0  # an open page asks for the status every two seconds
COLUMNS = ("name", "seen", "open", "replies", "tokens", "speed")


def summary_html(status: ClassStatus, locale: str) -> str:
    """The class in a line of figures."""
    students = [row for row in status.people if row.role is Role.STUDENT]
    here = sum(row.seen_s < HERE_S for row in students)
    figures = (
        ("here", f"{here}"), ("running", f"{status.running}"), ("waiting", f"{status.waiting}"),
        ("speed", f"{status.tokens_per_s:.0f}"), ("tokens", f"{status.tokens:,}"))
    tiles = "".join(
        f'<div class="lmd-tile" data-figure="{name}"><strong>{value}</strong>'
        f"<span>{escape(t(f'class.figure.{name}', locale))}</span></div>"
        for name, value in figures)
    state = "paused" if status.paused else "open"
    sentence = escape(t(f"class.state.{state}", locale))
    return (f'<p class="lmd-class-state" data-state="{state}" role="status">{sentence}</p>'
            f'<div class="lmd-tiles">{tiles}</div>')


def people_html(status: ClassStatus, viewer: Caller, locale: str) -> str:
    """A table of who is here; those who left are pale."""
    heads = "".join(f'<th scope="col">{escape(t(f"class.column.{name}", locale))}</th>'
                    for name in COLUMNS)
    rows = "".join(_row(row, viewer, locale) for row in status.people)
    empty = "" if any(row.role is Role.STUDENT for row in status.people) else (
        f'<p class="lmd-note">{escape(t("class.nobody", locale))}</p>')
    return (f'<div class="lmd-people" tabindex="0" role="region" '
            f'aria-label="{escape(t("class.people", locale))}"><table>'
            f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>{empty}")


def _row(row: PersonRow, viewer: Caller, locale: str) -> str:
    name = escape(row.name or t("class.program", locale))
    if row.role is Role.HOST:
        mark = t("class.you" if row.id == viewer.id else "class.host", locale)
        name += f' <span class="lmd-pill">{escape(mark)}</span>'
    replies = f"{row.running}" + (f" + {row.waiting}" if row.waiting else "")
    cells = (_ago(row.seen_s, locale), replies, f"{row.replies:,}", f"{row.tokens:,}",
             f"{row.tokens_per_s:.1f}")
    away = "" if row.seen_s < HERE_S else ' class="lmd-away"'
    return (f'<tr{away}><th scope="row">{name}</th>'
            + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")


def _ago(seconds: float, locale: str) -> str:
    """How long ago, roughly."""
    if seconds < HERE_S:
        return t("class.now", locale)
    if seconds < 90:
        return t("class.seconds_ago", locale, count=round(seconds))
    return t("class.minutes_ago", locale, count=round(seconds / 60))


def invitation_text(invitation: Invitation | None, locale: str) -> str:
    """What a host sends to students."""
    if invitation is None:
        return ""
    return t("class.invitation_text", locale, tunnel=invitation.tunnel, url=invitation.url,
             student_key=invitation.key)
