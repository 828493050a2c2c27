"""Every visible string of the page goes through ui/i18n.py, and every text is used."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from ui import forms, i18n, status_bar

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "ui").glob("*.py"))
ENGLISH = i18n.catalogs()["en"]
SCRIPT = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "assets/ui").glob("*.js"))
VISIBLE_ARGUMENTS = {"label", "placeholder", "info", "value", "title", "submit_btn", "stop_btn"}


def placeholders(text: str) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", text))


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """(where, name of the function, call) for every call in ui/*.py."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                yield f"ui/{path.name}:{node.lineno}", name, node


def used_keys() -> tuple[set[str], set[str]]:
    """(keys, beginnings of keys that are made at run time) that the code and the script name."""
    keys, beginnings = set(), set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                keys.add(node.value)
            if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
                beginnings.add(node.values[0].value)
    for quote, key in re.findall(r"text\(([\"`])([^\"`]+)\1", SCRIPT):
        name = i18n.SCRIPT_PREFIX + key
        if quote == "`":
            beginnings.add(name.partition("${")[0])
        else:
            keys.add(name)
    return keys, {b for b in beginnings if re.fullmatch(r"[a-z]+\.([a-z_]+\.)*", b)}


def test_keys_used_exist_and_none_is_unused() -> None:
    keys, beginnings = used_keys()
    spaces = {key.partition(".")[0] for key in ENGLISH}
    named = {k for k in keys if re.fullmatch(r"[a-z]+(\.\w+)+", k) and k.split(".")[0] in spaces}
    assert {key for key in named if not key.endswith((".css", ".js"))} <= set(ENGLISH)
    unused = {k for k in set(ENGLISH) - keys if not k.startswith(tuple(beginnings))}
    assert unused == set()


def test_reasons_and_states_have_words() -> None:
    for reason in ("stop", "length", "stopped", "failed"):
        assert i18n.t(f"stats.finish.{reason}")
    for state in ("loading", "ready", "restarting", "failed", "unreachable", "offline", "denied"):
        assert f"script.state.{state}" in ENGLISH


def test_values_of_t_are_the_texts_placeholders() -> None:
    for where, name, call in calls():
        if name == "t" and isinstance(call.args[0], ast.Constant):
            given = {keyword.arg for keyword in call.keywords} - {"locale"}
            assert given == placeholders(ENGLISH[call.args[0].value]), where


def test_what_is_said_to_somebody_is_said_in_their_language() -> None:
    """Errors may be said before anybody knows for whom: ui/sentences.py translates them."""
    whoever = [
        f"{where}: {ast.unparse(call)}" for where, name, call in calls()
        if name == "t" and len(call.args) < 2 and "locale" not in {k.arg for k in call.keywords}
        and not ast.literal_eval(call.args[0]).startswith("error.")]
    assert [found for found in whoever if "'page.title'" not in found] == []


def test_no_visible_literal_in_the_pages_code() -> None:
    def literal(node: ast.expr) -> bool:
        texts = [n.value for n in ast.walk(node)
                 if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        is_text = isinstance(node, ast.Constant | ast.JoinedStr)
        return is_text and any(re.search(r"[^\W\d_]", re.sub(r"<[^>]*>", "", s)) for s in texts)

    found = []
    for where, name, call in calls():
        if name.startswith("gr.") or name == "UserError":
            shown = [k.value for k in call.keywords if k.arg in VISIBLE_ARGUMENTS]
            if any(map(literal, [*call.args[:1], *shown])):
                found.append(f"{where}: {ast.unparse(call)[:80]}")
    found = [f for f in found if "gr.themes" not in f]  # names of fonts
    assert found == []
    assert re.sub(r"<[^>]*>|&nbsp;", "", status_bar.TEMPLATE).split() == ["LMDesk"]


@pytest.mark.parametrize("locale", sorted(set(i18n.catalogs()) - {"en"}))
def test_translations_fit_the_english_texts(locale: str) -> None:
    english = ENGLISH | forms.help_texts()
    texts = i18n.catalogs()[locale]
    assert set(ENGLISH) <= set(texts) <= set(english)  # help of settings may stay English
    for key, text in texts.items():
        assert placeholders(text) == placeholders(english[key]), key


def request(accept_language: str) -> SimpleNamespace:
    return SimpleNamespace(headers={"accept-language": accept_language}, cookies={})


@pytest.mark.parametrize(("header", "locale"), [
    ("", "en"),
    ("en-GB,en;q=0.8", "en"),
    ("zh-CN,zh;q=0.9,en;q=0.8", "zh-CN"),
    ("zh", "zh-CN"),
    ("zh-tw", "zh-CN"),
    ("tlh,zh;q=0.5", "zh-CN"),
    ("tlh, *;q=0.1", "en"),
])
def test_locale_follows_the_browser(
    monkeypatch: pytest.MonkeyPatch, header: str, locale: str
) -> None:
    catalogs = {"en": ENGLISH, "zh-CN": {"chat.send": "\u53d1\u9001"}}
    monkeypatch.setattr(i18n, "catalogs", lambda: catalogs)
    assert i18n.locale_of(request(header)) == locale
    assert i18n.locale_of(None) == "en"
    assert i18n.t("chat.send", locale) == catalogs[locale]["chat.send"]
    assert i18n.t("chat.stop", locale) == ENGLISH["chat.stop"]  # untranslated: English


def test_unknown_keys_are_mistakes() -> None:
    with pytest.raises(KeyError):
        i18n.t("no.such.key")
