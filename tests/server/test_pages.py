"""What is there besides answers: health, status, metrics, the API page, the page mounted at "/"."""

from __future__ import annotations

import asyncio
import json
import re
import runpy
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import PlainTextResponse

from backend.chat import ServiceStatus
from backend.classroom import Classroom
from backend.config import SamplingParams, ServerConfig
from backend.server.api import base_app
from backend.server.docs import api_page
from backend.server.metrics import Metrics
from backend.server.protocol import ChatRequest, CompletionRequest
from tests.server.support import NAME, Served, serve


def metrics(http: httpx.Client) -> dict[str, float]:
    reply = http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        sample.name + json.dumps(sample.labels, sort_keys=True) if sample.labels else sample.name:
        sample.value
        for family in text_string_to_metric_families(reply.text) for sample in family.samples}


def test_metrics_count_what_happens():
    with serve() as served, served.http() as http:
        before = metrics(http)
        assert before["lmdesk_kv_blocks"] == served.engine.info.num_blocks
        body = {"messages": [{"role": "user", "content": "hello"}]}
        assert http.post("/v1/chat/completions", json=body).status_code == 200
        http.post("/v1/chat/completions", json=body | {"stream": True})
        http.post("/v1/chat/completions", json=body | {"n": 0})
        http.get("/v1/models/other")
        http.get("/no/such/page")
        after = metrics(http)
        assert after["lmdesk_prompt_tokens_total"] == 10
        assert after["lmdesk_output_tokens_total"] == 12
        assert after["lmdesk_requests_running"] == after["lmdesk_requests_waiting"] == 0
        assert after["lmdesk_kv_blocks_free"] + after["lmdesk_kv_blocks_cached"] == (
            after["lmdesk_kv_blocks"])
        assert after["lmdesk_time_to_first_token_seconds_count"] == 2
        assert after["lmdesk_reply_seconds_count"] == 2
        assert after["lmdesk_inter_token_seconds_count"] >= 8

        def requests(route: str, status: int) -> float:
            labels = json.dumps({"route": route, "status": str(status)}, sort_keys=True)
            return after["lmdesk_http_requests_total" + labels]

        assert requests("/v1/chat/completions", 200) == 2
        assert requests("/v1/chat/completions", 400) == 1
        assert requests("/v1/models/{model:path}", 404) == 1
        assert requests("other", 404) == 1


def test_metrics_without_an_engine():
    text = Metrics(lambda: None, lambda: 0, lambda: 0).text().decode()
    assert "lmdesk_kv_blocks_free 0.0" in text and "lmdesk_preemptions_total 0.0" in text


def test_health_and_status(served: Served):
    with served.http() as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.head("/health").status_code == 200
        status = http.get("/api/status").json()
    assert status["state"] == "ready" and status["model"] == NAME
    assert status["info"]["session_len"] == served.engine.info.session_len
    assert status["memory"]["engine"] > 0


@pytest.mark.parametrize(("state", "sentence"), [
    ("loading", "being loaded"), ("ready", "no progress"), ("failed", "log says why")])
def test_health_keeps_details_to_itself(served: Served, monkeypatch, state: str, sentence: str):
    monkeypatch.setattr(served.engine, "healthy", lambda: False)
    monkeypatch.setattr(served.engine, "state", state)
    monkeypatch.setattr(served.engine, "detail", "There is no folder /home/somebody/model.")
    with served.http() as http:
        reply = http.get("/health")
    assert reply.status_code == 503 and sentence in reply.json()["error"]["message"]
    assert "somebody" not in reply.text


class Remote:
    """A backend that is asked for nothing but its status."""

    def __init__(self) -> None:
        self.asked = 0

    async def status(self) -> ServiceStatus:
        self.asked += 1
        return ServiceStatus("unreachable", "remote", "It does not answer.")


def test_the_application_over_a_remote_server():
    remote, trouble = Remote(), ["The remote server does not answer."]
    app = base_app(remote, ServerConfig(), Classroom(), lambda: trouble[0])  # type: ignore[arg-type]
    app.mount("/", PlainTextResponse("the page"))

    async def test() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            for _ in range(5):  # as many open pages ask
                status = (await http.get("/api/status")).json()
            assert status["state"] == "unreachable" and remote.asked == 1
            assert (await http.get("/health")).status_code == 503
            trouble[0] = ""
            assert (await http.get("/health")).status_code == 200
            assert (await http.get("/")).text == (await http.get("/any/thing")).text == "the page"
            # What belongs to the API is not answered by the page.
            for method, path, code in [
                ("GET", "/v1/models", 404), ("POST", "/v1/chat/completions", 404),
                ("GET", "/api/other", 404), ("POST", "/health", 405), ("POST", "/api/status", 405),
            ]:
                reply = await http.request(method, path)
                assert reply.status_code == code and "error" in reply.json(), path
    asyncio.run(test())


class Outside(HTMLParser):
    """Collects everything that a browser would fetch, and every script."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe", "object"):
            self.found.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_api_page_is_complete_and_needs_nothing_else(served: Served):
    with served.http() as http:
        reply = http.get("/docs")
        assert http.get("/").text == reply.text  # of a server without the page
    assert reply.headers["content-type"].startswith("text/html")
    page = Outside()
    page.feed(reply.text)
    assert page.found == ["script"] and "@import" not in reply.text and "url(" not in reply.text
    for model in (ChatRequest, CompletionRequest):
        for name in [*model.model_fields, *model.no_effect, *model.neutral]:
            assert f"<code>{name}</code>" in reply.text, name
    assert "from 0.0 to 2.0" in page.text and SamplingParams().top_p == 0.8
    assert re.search(r"temperature</code>.*?<code>0\.5</code>", reply.text), "the model's default"


def test_the_api_page_escapes_and_shows_the_key_only_where_needed():
    page = api_page('a"<b></script>', 6006, {}, True)
    assert "<b>" not in page and page.count("</script>") == 1 and "LMDESK_API_KEY" in page
    assert "LMDESK_API_KEY" not in api_page("m", 6006, {}, False)


def test_the_example_of_the_api_page_works(
    served: Served, capsys: pytest.CaptureFixture, tmp_path: Path
):
    page = Outside()
    page.feed(api_page(NAME, served.port, {}, False))
    begin = page.text.index("from openai")
    program = tmp_path / "example.py"
    program.write_text(page.text[begin:page.text.index("POST /v1", begin)], encoding="utf-8")
    runpy.run_path(str(program))
    assert capsys.readouterr().out == "Hello!"


def test_openapi_names_the_request_bodies(served: Served):
    with served.http() as http:
        schema = http.get("/openapi.json").json()
    for path, model in (("/v1/chat/completions", "ChatRequest"),
                        ("/v1/completions", "CompletionRequest")):
        content = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert content["schema"]["$ref"].endswith("/" + model)
    assert "422" not in json.dumps(list(schema["paths"].values()))
    named = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(schema)))
    assert named <= set(schema["components"]["schemas"])
    temperature = schema["components"]["schemas"]["ChatRequest"]["properties"]["temperature"]
    assert temperature["anyOf"][0] == {"type": "number", "minimum": 0.0, "maximum": 2.0}
