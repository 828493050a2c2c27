"""Bodies that nobody would write: every route answers 200 or one clear 4xx, and goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from backend.server.lmdeploy_protocol import EncodeRequest, InteractiveRequest
from backend.server.protocol import ChatRequest, CompletionRequest
from backend.server.strict import Strict
from tests.server.support import Served

TEXT = st.text(max_size=20) | st.sampled_from(["", "hello", "\x00", "\ud800", "你好 🌍", "</s>"])
NUMBER = (
    st.integers(-3, 12) | st.sampled_from([0, 1, -1, 255, 256, 257, 1 << 31, 1 << 63, 10**30])
    | st.floats() | st.floats(0, 2)
)
SCALAR = st.none() | st.booleans() | NUMBER | TEXT
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | SCALAR,
     "content": TEXT | SCALAR | st.lists(SCALAR, max_size=3)},
    optional={"name": SCALAR, "tool_calls": SCALAR, "zzz": SCALAR})
VALUE = st.recursive(
    SCALAR | MESSAGE, lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8)
# What each route must have, as it should be; any of it may be replaced.
ROUTES: dict[str, tuple[type[Strict], dict[str, Any]]] = {
    "/v1/chat/completions": (ChatRequest, {"messages": [{"role": "user", "content": "hello"}]}),
    "/v1/completions": (CompletionRequest, {"prompt": "hello"}),
    "/v1/chat/interactive": (InteractiveRequest, {"prompt": "hello"}),
    "/v1/encode": (EncodeRequest, {"input": "hello"}),
}


def bodies(model: type[Strict], needed: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    names = [*model.model_fields, *model.no_effect, *model.neutral, "zzz"]
    return st.dictionaries(st.sampled_from(names), VALUE, max_size=4).map(
        lambda given: {**needed, **given})


@pytest.mark.parametrize("path", ROUTES)
def test_any_body_is_answered(served: Served, path: str):
    model, needed = ROUTES[path]
    with served.http() as http:

        @given(bodies(model, needed))
        @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck),
                  derandomize=True)
        def check(body: dict[str, Any]) -> None:
            reply = http.post(path, content=json.dumps(body).encode())
            if reply.status_code != 200:
                assert reply.status_code in (400, 404, 409), (body, reply.text)
                error = reply.json()["error"]
                assert error["type"] == "invalid_request_error"
                assert len(error["message"]) < 700 and error["message"].endswith((".", "?")), error
            canary = http.post("/v1/encode", json={"input": "a"})
            assert canary.json() == {"input_ids": [97], "length": 1}

        check()
    served.assert_all_ended()
