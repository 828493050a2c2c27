"""The page that asks a browser for the key, and in a class for a name. Plain HTML, nothing from
outside; in the first language of the browser's that it has."""

from __future__ import annotations

from html import escape

from backend.classroom import MAX_NAME

_PAGE = """<!doctype html>
<html lang="{lang}"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>LMDesk: {key}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 26rem; margin: 15vh auto; padding: 0 1rem;
       color: #1f2430; background: #fff; }}
input, button {{ font: inherit; padding: .5rem .7rem; box-sizing: border-box; width: 100%;
       margin: .4rem 0; border: 1px solid #8a90a0; border-radius: 6px; }}
button {{ background: #2456c7; color: #fff; border-color: #2456c7; cursor: pointer; }}
.wrong {{ color: #b3261e; }}
@media (prefers-color-scheme: dark) {{
  body {{ color: #e6e8ee; background: #16181d; }}
  input {{ color: inherit; background: #22252d; }}
  .wrong {{ color: #ff8a80; }}
}}
</style></head><body>
<h1>LMDesk</h1>
<p>{asks}</p>
{alert}
<form method="post" action="./{up}login" accept-charset="utf-8">
{fields}
<button type="submit">{go}</button>
</form>
{own}
</body></html>
"""
_KEY = """<label for="key">{key}</label>
<input id="key" name="key" type="password" autocomplete="current-password" {need}>"""
_NAME = """<label for="name">{label}</label>
<input id="name" name="name" value="{name}" maxlength="{most}" autocomplete="name" required>"""

_OWN = """<p>{label}</p>
<input value="{key}" aria-label="{label}" readonly onfocus="this.select()">"""

_WORDS = {
    "en": {
        "key": "API key", "name": "Your name", "go": "Continue",
        "asks": "This server asks for its API key. It was printed where the server was started.",
        "asks_class": "Enter the key that you were given, and the name that you are known by.",
        "asks_name": "Choose another name, or enter another key.",
        "own": "Your own key, for programs that use the API in your name:",
        "wrong_key": "The key is wrong.",
        "wrong_name": f"A name has 1 to {MAX_NAME} letters, digits and signs.",
    },
    "zh": {
        "key": "API 密钥", "name": "你的名字", "go": "继续",
        "asks": "此服务器需要 API 密钥。启动服务器的终端里显示了它。",
        "asks_class": "请输入老师给你的密钥,以及大家认得的名字。",
        "asks_name": "可以换一个名字,或换一个密钥。",
        "own": "你自己的密钥,供程序以你的名义使用 API:",
        "wrong_key": "密钥不正确。",
        "wrong_name": f"名字须为 1 至 {MAX_NAME} 个文字、数字或符号。",
    },
}


def login_page(
    accept_language: str = "", depth: int = 0, wrong: str = "", name: str | None = None,
    own_key: str = "",
) -> str:
    """The form.

    Args:
        accept_language: the browser's header.
        depth: how many folders below the root the page is shown; the form finds its way by
            relative paths, whatever prefix a proxy puts in front.
        wrong: "key" or "name", as that was wrong with the last attempt.
        name: to begin with; None if none is asked for.
        own_key: of somebody who is in already, and has one in a class.
    """
    lang = _language(accept_language)
    words = _WORDS[lang]
    alert = f'<p class="wrong" role="alert">{words[f"wrong_{wrong}"]}</p>' if wrong else ""
    asks, fields = "asks", [_KEY.format(
        key=words["key"], need="" if own_key else "required autofocus")]
    if name is not None:
        asks = "asks_name" if own_key else "asks_class"
        fields.append(_NAME.format(label=words["name"], name=escape(name), most=MAX_NAME))
    own = _OWN.format(label=words["own"], key=own_key) if own_key else ""
    return _PAGE.format(lang=lang, key=words["key"], asks=words[asks], up="../" * depth,
                        alert=alert, fields="\n".join(fields), go=words["go"], own=own)


def _language(accept_language: str) -> str:
    for wish in accept_language.split(","):
        language = wish.split(";")[0].strip().lower().split("-")[0]
        if language in _WORDS:
            return language
    return "en"
