"""What the config tab shows of settings: whence a value comes, what changes, what it means in
memory."""

from __future__ import annotations

from html import escape

from backend.footprint import Fit
from backend.workspace.keys import KEYS, Key
from backend.workspace.settings import Row
from ui import forms
from ui.i18n import catalogs, t


def note(key: Key, row: Row, locale: str) -> str:
    """The lines under a setting: what it is and may be, then whence its value comes."""
    text = catalogs().get(locale, {}).get(forms.setting_help_key(key)) or key.help
    lines = [text[:1].upper() + text[1:]]
    if key is KEYS["quant_policy"]:
        lines.append(t("settings.note.workspace_policy", locale))
    return "\n".join([*lines, " · ".join([*_bounds(key, locale), source(row, locale)])])


def source(row: Row, locale: str) -> str:
    """Where the effective value comes from, and that value where a flag wins."""
    kind = source_kind(row)
    if kind == "flag":
        return t("settings.source.flag", locale, flag=row.source, value=row.value)
    return t(f"settings.source.{kind}", locale, value=row.value) if kind == "model" else t(
        f"settings.source.{kind}", locale)


def source_kind(row: Row) -> str:
    """"flag", "default", "model" or "file"."""
    if row.source.startswith("--"):
        return "flag"
    return row.source if row.source in ("default", "model") else "file"


def _bounds(key: Key, locale: str) -> list[str]:
    if not key.low or key.locked:  # 0 is told where it means something
        return []
    if key.high is None:
        return [t("settings.at_least", locale, low=f"{key.low:g}")]
    return [t("settings.between", locale, low=f"{key.low:g}", high=f"{key.high:,g}")]


def diff_html(diff: str, locale: str) -> str:
    """A unified diff, additions and removals told apart by sign and colour."""
    if not diff:
        return f'<p class="lmd-quiet">{escape(t("settings.no_changes", locale))}</p>'
    kinds = {"+": "add", "-": "del", "@": "at"}
    lines = [
        f'<span class="lmd-{"file" if number < 2 else kinds.get(line[:1], "same")}">'
        f"{escape(line) or ' '}</span>"
        for number, line in enumerate(diff.splitlines())
    ]
    return f'<pre class="lmd-diff">{"".join(lines)}</pre>'


def problem_html(message: str) -> str:
    """A sentence that says what is wrong with what was typed."""
    return f'<p class="lmd-problem">{escape(message)}</p>'


def waiting_html(locale: str) -> str:
    """While the model is being looked at."""
    return f'<p class="lmd-quiet lmd-busy">{escape(t("settings.measuring", locale))}</p>'


def memory_html(fit: Fit, saved: Fit | None, freed: int, locale: str) -> str:
    """The memory as a bar, then what it holds; figures that differ from the `saved` ones beside
    those."""
    made = fit.footprint
    free = min(made.free + freed, made.total)
    left = max(free - made.weight_bytes - fit.kv_bytes, 0)
    parts = [("others", made.total - free), ("weights", made.weight_bytes),
             ("kv", fit.kv_bytes), ("free", left)]
    bar = "".join(
        f'<span class="lmd-part-{name}" style="flex-grow:{size / made.total:.4f}"></span>'
        for name, size in parts if size > 0
    )
    legend = "".join(
        f'<span class="lmd-key-{name}">{escape(t(f"settings.memory.{name}", locale))} '
        f"<b>{gigabytes(size)}</b></span>"
        for name, size in parts
    )
    old = saved or fit
    rows = [
        ("weights_are", gigabytes(made.weight_bytes) + " · " + (made.quantization or made.dtype),
         gigabytes(old.footprint.weight_bytes) + " · "
         + (old.footprint.quantization or old.footprint.dtype)),
        ("per_token", t("settings.memory.bytes", locale, count=f"{fit.kv_bytes_per_token:,}",
                        bits=fit.kv_bits),
         t("settings.memory.bytes", locale, count=f"{old.kv_bytes_per_token:,}",
           bits=old.kv_bits)),
        ("tokens", f"{fit.tokens:,}", f"{old.tokens:,}"),
        ("conversations", _conversations(fit, locale), _conversations(old, locale)),
        ("room", f"{rounded(fit.room):,}", f"{rounded(old.room):,}"),
    ]
    table = "".join(
        f"<dt>{escape(t(f'settings.memory.{name}', locale))}</dt>"
        f"<dd>{f'<s>{escape(before)}</s> ' if before != now else ''}<b>{escape(now)}</b></dd>"
        for name, now, before in rows
    )
    device = t("settings.memory.device", locale, device=made.device.upper()
               if made.device == "cpu" else made.device, total=gigabytes(made.total))
    return (f'<div class="lmd-memory"><div class="lmd-bar-of">{escape(device)}</div>'
            f'<div class="lmd-parts">{bar}</div><div class="lmd-legend">{legend}</div>'
            f"<dl>{table}</dl></div>")


def _conversations(fit: Fit, locale: str) -> str:
    return t("settings.memory.of_length", locale, count=f"{fit.conversations:,}",
             length=f"{fit.session_len:,}")


def gigabytes(size: int) -> str:
    """Bytes as GB (10^9), with three figures."""
    value = size / 1e9
    return f"{value:.{3 if value < 1 else 2 if value < 100 else 0}f} GB"


def rounded(count: int) -> int:
    """To two figures: what is free changes all the time."""
    scale = 10 ** max(len(str(count)) - 2, 0)
    return count // scale * scale
