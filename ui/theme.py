"""Looks: colours, fonts, and the page's own style sheet and script from assets/ui/."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import gradio as gr

from ui.i18n import DEFAULT_LOCALE, script_messages

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "ui"
LOGO = ASSETS / "logo.svg"

# System fonts only: nothing is fetched, and Chinese has a face on every platform.
SANS = ("Inter", "Segoe UI", "Roboto", "Helvetica Neue", "PingFang SC", "Microsoft YaHei",
        "Noto Sans CJK SC", "Noto Sans SC", "sans-serif")
MONO = ("JetBrains Mono", "SF Mono", "Cascadia Code", "Consolas", "DejaVu Sans Mono",
        "Noto Sans Mono CJK SC", "monospace")


def theme() -> gr.themes.Base:
    """A calm theme: slate greys, one teal accent, soft corners, light and dark."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_lg,
        font=[gr.themes.Font(name) for name in SANS],
        font_mono=[gr.themes.Font(name) for name in MONO],
    ).set(
        body_background_fill="#f7f8fa",
        body_background_fill_dark="#0e1116",
        body_text_color="#1d2430",
        body_text_color_dark="#e4e8ee",
        body_text_color_subdued="#667085",
        body_text_color_subdued_dark="#93a0b2",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#151a21",
        background_fill_secondary="#f1f3f6",
        background_fill_secondary_dark="#1b222b",
        border_color_primary="#e3e7ee",
        border_color_primary_dark="#29313d",
        block_background_fill="#ffffff",
        block_background_fill_dark="#151a21",
        block_border_color="#e3e7ee",
        block_border_color_dark="#29313d",
        block_shadow="none",
        block_label_background_fill="transparent",
        block_title_text_weight="600",
        input_background_fill="#ffffff",
        input_background_fill_dark="#1b222b",
        input_border_color="#d5dbe5",
        input_border_color_dark="#323c4a",
        input_border_color_focus="*primary_500",
        input_shadow_focus="0 0 0 3px rgba(20, 184, 166, .18)",
        button_primary_background_fill="#0f766e",
        button_primary_background_fill_hover="#0d655e",
        button_primary_background_fill_dark="#14857b",
        button_primary_background_fill_hover_dark="#179a8f",
        button_primary_text_color="#ffffff",
        button_secondary_background_fill="transparent",
        button_secondary_background_fill_dark="transparent",
        button_secondary_border_color="#d5dbe5",
        button_secondary_border_color_dark="#323c4a",
        button_cancel_background_fill="#fff1f0",
        button_cancel_background_fill_dark="#3a1d1c",
        button_cancel_text_color="#b42318",
        button_cancel_text_color_dark="#fda29b",
        button_cancel_border_color="#fecdca",
        button_cancel_border_color_dark="#7a271a",
        color_accent_soft="#e3f4f1",
        color_accent_soft_dark="#12332f",
    )


def css() -> str:
    """The page's style sheets, page.css first and then a file a tab; the logo is in them, for
    Gradio strips drawings out of its texts."""
    logo = base64.b64encode(LOGO.read_bytes()).decode()
    sheet = _joined("page.css", "css")
    return f':root {{ --lmd-logo: url("data:image/svg+xml;base64,{logo}"); }}\n{sheet}'


def head(instance: str) -> str:
    """The page's script for <head>, with its texts and this server's `instance` name.

    Browser storage of all tunnelled servers is shared (they all are 127.0.0.1:6006), so the
    script prefixes what it stores with `instance`.
    """
    settings = {"instance": instance, "fallback": DEFAULT_LOCALE, "messages": script_messages()}
    data = json.dumps(settings, ensure_ascii=False).replace("<", "\\u003c")
    script = _joined("page.js", "js")
    return f"<script>window.LMDESK = {data};</script><script>{script}</script>"


def _joined(first: str, kind: str) -> str:
    """Texts of all files of a kind in assets/ui/, `first` first."""
    paths = sorted(ASSETS.glob(f"*.{kind}"), key=lambda path: (path.name != first, path.name))
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)
