"""Every visible string of the page, from `assets/locales/<locale>/*.json`: a file a tab.

Three roads lead from a key to the reader. `label` marks text of a component, which the browser
translates. `t` is for text that the server makes per request (toasts, counts), in the reader's
locale. `script_messages` hands the keys that the page's own script draws to that script.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.i18n import I18nData

LOCALES = Path(__file__).resolve().parent.parent / "assets" / "locales"
DEFAULT_LOCALE = "en"
ERRORS = "errors.json"  # of a locale: the backend's sentences, see ui/sentences.py
LANGUAGE_COOKIE = "lmdesk_language"
SCRIPT_PREFIX = "script."  # keys that assets/ui/page.js draws


@cache
def catalogs() -> dict[str, dict[str, str]]:
    """Locale ("en", "zh-CN") -> key -> text, of all files of the locale's folder but `ERRORS`."""
    return {
        folder.name: {
            key: text
            for path in sorted(folder.glob("*.json")) if path.name != ERRORS
            for key, text in json.loads(path.read_text(encoding="utf-8")).items()
        }
        for folder in sorted(LOCALES.iterdir())
    }


def gradio_i18n(extra: Mapping[str, str]) -> gr.I18n:
    """All catalogs for the browser; `extra` adds English texts that live in code (field help)."""
    return gr.I18n(**{
        locale: {**extra, **texts} if locale == DEFAULT_LOCALE else dict(texts)
        for locale, texts in catalogs().items()
    })


def label(key: str) -> I18nData:
    """The text of `key`, to be chosen by the browser when it draws the component."""
    return I18nData(key)


def t(key: str, locale: str = DEFAULT_LOCALE, **values: Any) -> str:
    """The text of `key` in `locale` with `{placeholders}` filled; English where it is missing."""
    text = catalogs().get(locale, {}).get(key) or catalogs()[DEFAULT_LOCALE][key]
    return text.format(**values) if values else text


def locale_of(request: gr.Request | None) -> str:
    """The best of our locales for a browser: what was chosen on the page (see page.js), else by
    its Accept-Language header."""
    chosen = request.cookies.get(LANGUAGE_COOKIE, "") if request else ""
    if chosen in catalogs():
        return chosen
    header = request.headers.get("accept-language", "") if request else ""
    for wish in header.split(","):
        language = wish.split(";")[0].strip().lower()
        for locale in catalogs():
            if language == locale.lower():
                return locale
        for locale in catalogs():
            if language and language.split("-")[0] == locale.lower().split("-")[0]:
                return locale
    return DEFAULT_LOCALE


def script_messages() -> dict[str, dict[str, str]]:
    """Locale -> key (without prefix) -> text, for the page's script."""
    return {
        locale: {key[len(SCRIPT_PREFIX):]: text for key, text in texts.items()
                 if key.startswith(SCRIPT_PREFIX)}
        for locale, texts in catalogs().items()
    }
