"""The page that asks a browser for the key. Plain HTML, nothing from outside."""

from __future__ import annotations

from html import escape

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>LMDesk: API key</title>
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
<p>This server asks for its API key. It was printed where the server was started.</p>
{wrong}
<form method="post" action="./{up}login">
<label for="key">API key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<button type="submit">Continue</button>
</form></body></html>
"""


def login_page(depth: int = 0, wrong: str = "") -> str:
    """The form.

    Args:
        depth: how many folders below the root the page is shown; the form finds its way by
            relative paths, whatever prefix a proxy puts in front.
        wrong: a sentence on what was wrong with the last attempt.
    """
    alert = f'<p class="wrong" role="alert">{escape(wrong)}</p>' if wrong else ""
    return _PAGE.format(up="../" * depth, wrong=alert)
