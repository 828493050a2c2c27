"""The API page at /docs and the schemas of /openapi.json, made from the request models.

One static page: it works offline, and cannot disagree with what the server takes. Its only script
sends what is written in its one field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.routing import BaseRoute

from backend.config import SamplingParams
from backend.server.lmdeploy_protocol import EncodeRequest, InteractiveRequest
from backend.server.protocol import ChatRequest, CompletionRequest, Message, StreamOptions
from backend.server.strict import Strict, expects

_REF = "#/components/schemas/{model}"
_BODIES: tuple[type[Strict], ...] = (
    ChatRequest, CompletionRequest, InteractiveRequest, EncodeRequest)


def openapi_schema(routes: Sequence[BaseRoute]) -> dict[str, Any]:
    """OpenAPI's description of `routes`, with the bodies that they parse themselves."""
    schema = get_openapi(title="LMDesk", version="1", routes=routes)
    for operations in schema["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own way to refuse, not ours
    _, bodies = models_json_schema(
        [(body, "validation") for body in _BODIES], ref_template=_REF)
    schema["components"] = {"schemas": bodies["$defs"]}
    return schema


def body_schema(model: type[Strict]) -> dict[str, Any]:
    """What tells OpenAPI that a route takes `model`, although it parses its body itself."""
    content = {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def _table(model: type[Strict], defaults: Mapping[str, Any]) -> str:
    """The fields of `model`, and those that it takes without effect."""
    sampling = SamplingParams(**defaults)
    rows = []
    needed_first = sorted(model.model_fields.items(), key=lambda item: not item[1].is_required())
    for name, info in needed_first:
        shown = "<em>needed</em>"
        if not info.is_required():
            default = getattr(sampling, name, None) if info.default is None else info.default
            empty = default in (None, (), {})
            shown = "" if empty else f"<code>{escape(json.dumps(default))}</code>"
        rows.append(
            f"<tr><th scope=row><code>{name}</code></th><td>{escape(expects(model, name))}</td>"
            f"<td>{shown}</td><td>{escape(info.description or '')}</td></tr>")
    table = ("<table><thead><tr><th>Field<th>Must be<th>Default<th>Meaning</tr></thead><tbody>"
             + "".join(rows) + "</tbody></table>")
    notes = [f"<li><code>{name}</code> is accepted without effect: {escape(why)}.</li>"
             for name, why in model.no_effect.items()]
    if model.neutral:
        names = ", ".join(f"<code>{name}</code>" for name in model.neutral)
        notes.append(f"<li>Accepted only with values that ask for nothing (null, empty, the usual "
                     f"default): {names}.</li>")
    return table + (f"<ul>{''.join(notes)}</ul>" if notes else "")


def api_page(model: str, port: int, defaults: Mapping[str, Any], needs_key: bool) -> str:
    """The page as HTML.

    Args:
        model: its name in the API.
        port: where the server listens, for the examples.
        defaults: the model's own sampling defaults.
        needs_key: whether the examples send a key.
    """
    url = f"http://127.0.0.1:{port}"
    header = '  -H "Authorization: Bearer $LMDESK_API_KEY" \\\n' if needs_key else ""
    key = 'os.environ["LMDESK_API_KEY"]' if needs_key else '"none"'
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}]})
    curl = (f"curl {url}/v1/chat/completions \\\n{header}"
            f"  -H \"Content-Type: application/json\" \\\n  -d '{body}'")
    python = f"""{'import os' + chr(10) if needs_key else ''}from openai import OpenAI

client = OpenAI(base_url="{url}/v1", api_key={key})
stream = client.chat.completions.create(
    model={json.dumps(model)},
    messages=[{{"role": "user", "content": "Hello!"}}],
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)"""
    routes = "".join(
        f"<tr><th scope=row><code>{method} {path}</code></th><td>{text}</td></tr>"
        for method, path, text in _ROUTES)
    bodies = _samples(model)
    return _PAGE.format(
        paths="".join(f"<option>{path}" for path in bodies), script=_SCRIPT.replace(
            "SAMPLES", json.dumps(bodies).replace("<", "\\u003c")),  # no name ends the script
        model=escape(model), routes=routes, curl=escape(curl), python=escape(python),
        chat=_table(ChatRequest, defaults), completions=_table(CompletionRequest, defaults),
        message=_table(Message, {}), stream_options=_table(StreamOptions, {}),
        interactive=_table(InteractiveRequest, defaults), encode=_table(EncodeRequest, {}))


def _samples(model: str) -> dict[str, str]:
    """A body to begin with, as text, by route."""
    sampling = {"temperature": 0.7, "max_tokens": 128, "stream": False}  # whole is easier to read
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {
            "model": model, "messages": [{"role": "user", "content": "Hello!"}], **sampling},
        "/v1/completions": {"model": model, "prompt": "Once upon a time", **sampling},
        "/v1/chat/interactive": {
            "prompt": "Hello!", "session_id": 1, "interactive_mode": True, "stream": False},
        "/v1/encode": {"input": "Hello!"},
    }
    return {path: json.dumps(body, indent=2) for path, body in bodies.items()}


# The path is relative: a proxy before the server may add a prefix.
_SCRIPT = """
const samples = SAMPLES, at = id => document.getElementById(id);
const path = at("path"), body = at("body"), send = at("send"), answer = at("answer");
const fill = () => { body.value = samples[path.value]; };
let open = null;
path.onchange = fill;
fill();
send.onclick = async () => {
  if (open) { open.abort(); return; }
  open = new AbortController();
  send.textContent = "Stop";
  answer.hidden = false;
  answer.textContent = "";
  try {
    const reply = await fetch(path.value.slice(1), {
      method: "POST", body: body.value, signal: open.signal,
      headers: {"Content-Type": "application/json"}});
    answer.textContent = `${reply.status} ${reply.statusText}\\n\\n`;
    const pieces = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let piece; !(piece = await pieces.read()).done;) answer.append(piece.value);
  } catch (error) {
    answer.append(`\\n${error.message}`);
  }
  open = null;
  send.textContent = "Send";
};
"""

_ROUTES = (
    ("POST", "/v1/chat/completions", "the assistant's next turn"),
    ("POST", "/v1/completions", "the continuation of a text"),
    ("POST", "/v1/chat/interactive", "LMDeploy's: the next turn of a conversation kept here"),
    ("GET", "/v1/chat/interactive?session_id=N", "what was said in it, as <code>messages</code>"),
    ("POST", "/v1/encode", "LMDeploy's: the token ids of a text"),
    ("GET", "/v1/models", "the served model"),
    ("GET", "/v1/models/{model}", "the same, by its name"),
    ("GET", "/health", "200 while the engine is idle or makes progress, else 503; needs no key"),
    ("GET", "/metrics", "figures for Prometheus"),
    ("GET", "/api/status", "state, load and memory, as the status bar shows them"),
    ("GET", "/openapi.json", "this page for programs"),
)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>LMDesk API</title>
<style>
body {{ font: 16px/1.55 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto;
       padding: 0 1rem; color: #1f2430; background: #fff; }}
code, pre {{ font: .9em/1.5 ui-monospace, Consolas, monospace; }}
pre {{ background: #f3f4f7; padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; display: block; overflow-x: auto; }}
th, td {{ text-align: left; vertical-align: top; padding: .35rem .7rem .35rem 0;
         border-bottom: 1px solid #d9dce3; font-weight: normal; }}
thead th {{ font-weight: 600; }}
textarea {{ font: .9em/1.5 ui-monospace, Consolas, monospace; width: 100%; padding: .6rem .8rem;
           box-sizing: border-box; color: inherit; background: inherit; }}
#answer {{ white-space: pre-wrap; max-height: 30rem; overflow-y: auto; }}
select, button {{ font: inherit; padding: .3rem .8rem; color: inherit; background: inherit; }}
textarea, select, button {{ border: 1px solid #8a90a0; border-radius: 6px; }}
@media (prefers-color-scheme: dark) {{
  body {{ color: #e6e8ee; background: #16181d; }}
  pre {{ background: #22252d; }}
  th, td {{ border-color: #3a3f4b; }}
}}
</style></head><body>
<h1>LMDesk API</h1>
<p>OpenAI's interface, and LMDeploy's, for the model <code>{model}</code>. Any OpenAI client works;
numbers must be numbers, and unknown fields are refused by name, so that no setting is lost by a
slip.</p>
<h2>Routes</h2>
<table><tbody>{routes}</tbody></table>
<h2>Try it</h2>
<p><label>POST <select id="path">{paths}</select></label></p>
<textarea id="body" rows="12" spellcheck="false" aria-label="body, in JSON"></textarea>
<p><button id="send">Send</button></p>
<pre id="answer" role="log" tabindex="0" hidden></pre>
<script>{script}</script>
<h2>Examples</h2>
<pre>{curl}</pre>
<pre>{python}</pre>
<h2>POST /v1/chat/completions</h2>
{chat}
<h3>A message</h3>
{message}
<h3>stream_options</h3>
{stream_options}
<h2>POST /v1/completions</h2>
{completions}
<h2>POST /v1/chat/interactive</h2>
<p>The server keeps the conversation: send what is new. Sessions belong to their API key, answer one
request at a time (409 <code>session_busy</code>) and end when <code>interactive_mode</code> is
false, or after an hour without use. The answer is
<code>{{"text", "tokens", "finish_reason"}}</code>; a stream has one such line of JSON for each
piece, without <code>data:</code>.</p>
{interactive}
<h2>POST /v1/encode</h2>
<p>The answer is <code>{{"input_ids", "length"}}</code>, lists of these for a list of texts.</p>
{encode}
<h2>Streams of OpenAI's routes</h2>
<p>With <code>"stream": true</code> the answer comes as server-sent events and ends with
<code>data: [DONE]</code>. If something fails on the way, the last event is
<code>data: {{"error": ...}}</code> instead. Closing the connection ends the work at once.</p>
<h2>Errors</h2>
<p><code>{{"error": {{"message", "type", "param", "code"}}}}</code> with a true status: 400 bad
input (<code>param</code> names the field), 401 no or a wrong key, 404 unknown route or model, 405,
409 a busy session, 413 a body over 2 MB, 429 too many open replies or sessions of one key, 503 the
queue is full or the model is not ready (<code>Retry-After</code> says when to ask again).</p>
</body></html>
"""
