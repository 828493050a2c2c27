"""The web application: guard, status and, with an engine of our own, the routes of the API.

The page is mounted on the same application afterwards, at "/", so that one port (and one tunnel)
serves people and programs, and one guard stands before both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Match, Route

from backend.classroom import Classroom, require_host
from backend.config import ServerConfig
from backend.server import lmdeploy_protocol, protocol
from backend.server.auth import Guard, caller
from backend.server.class_routes import add_class_routes
from backend.server.docs import api_page, body_schema, openapi_schema
from backend.server.failures import error_body, install_error_handlers
from backend.server.interactive import InteractiveRoutes
from backend.server.lmdeploy_routes import LMDeployRoutes
from backend.server.metrics import CONTENT_TYPE, CountRequests, Metrics
from backend.server.openai_routes import OpenAIRoutes
from backend.server.sessions import Sessions

if TYPE_CHECKING:
    from backend.chat import ChatBackend
    from backend.engine_manager import EngineManager

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
# Told to everybody who asks /health, so without the details that /api/status has.
TROUBLES = {
    "unloaded": "No model is loaded.",
    "loading": "The model is being loaded.",
    "ready": "The engine makes no progress.",
    "restarting": "The engine died and is being started again.",
    "failed": "The model is not served; the server's log says why.",
}
STATUS_SECONDS = 0.5  # many open pages poll; they share an answer for so long


def base_app(
    backend: ChatBackend, config: ServerConfig, classroom: Classroom, trouble: Callable[[], str]
) -> FastAPI:
    """The application without OpenAI's routes, as the page needs it over a remote server.

    Args:
        backend: what the page talks to; asked for /api/status.
        config: the final port, and keys as `auth.resolve_keys` leaves them.
        classroom: is told who comes in.
        trouble: why the service cannot answer now, in a sentence; "" when it can.

    Raises:
        UserError: the server would be open to others without a key.
    """
    app = bare_app(config)
    _add_status(app, backend, classroom, trouble)
    add_class_routes(app, classroom)
    add_fallbacks(app)
    app.add_middleware(Guard, config=config, seen=classroom.see)
    return app


def create_app(
    engines: EngineManager,
    config: ServerConfig,
    classroom: Classroom,
    *,
    sessions: Sessions | None = None,
    docs_at_root: bool = False,
) -> FastAPI:
    """The application over engines of our own.

    Args:
        engines: has what answers; the caller starts and stops it.
        config: as in `base_app`.
        classroom: who comes in, and how much work may be open at a time.
        sessions: keeps the conversations of /v1/chat/interactive; by default as many and as long
            as is usual.
        docs_at_root: the API page at "/" too, where the tutorials' users look for it; not for an
            application that gets the page there.

    Raises:
        UserError: the server would be open to others without a key.
    """
    metrics = Metrics(
        lambda: chat.engine.stats if (chat := engines.current) else None,
        lambda: chat.engine.info.num_blocks
        if (chat := engines.current) and chat.engine.info else 0)
    work = engines, classroom, metrics
    routes, lmdeploy = OpenAIRoutes(*work), LMDeployRoutes(*work)
    talks = InteractiveRoutes(lmdeploy, classroom.admit, sessions or Sessions())

    async def metrics_text(request: Request) -> Response:
        """Figures for Prometheus; in a class for its hosts."""
        require_host(caller(request))
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    async def docs(request: Request) -> Response:
        """The API page."""
        chat = engines.current
        name, defaults = (chat.model_name, chat.sampling_defaults) if chat else ("MODEL", {})
        page = api_page(name, config.server_port, defaults, bool(config.api_keys))
        return HTMLResponse(page)

    def trouble() -> str:
        if engines.current is None:
            return TROUBLES["unloaded"]
        engine = engines.current.engine
        return "" if engine.healthy() else TROUBLES[engine.state]

    app = bare_app(config)
    _add_status(app, engines, classroom, trouble)
    add_class_routes(app, classroom)
    app.add_api_route("/v1/models", routes.list_models, methods=["GET"])
    app.add_api_route("/v1/models/{model:path}", routes.get_model, methods=["GET"])
    app.add_api_route("/v1/chat/completions", routes.chat_completions, methods=["POST"],
                      openapi_extra=body_schema(protocol.ChatRequest))
    app.add_api_route("/v1/completions", routes.completions, methods=["POST"],
                      openapi_extra=body_schema(protocol.CompletionRequest))
    app.add_api_route("/v1/chat/interactive", talks.interactive, methods=["POST"],
                      openapi_extra=body_schema(lmdeploy_protocol.InteractiveRequest))
    app.add_api_route("/v1/chat/interactive", talks.history, methods=["GET"])
    app.add_api_route("/v1/encode", lmdeploy.encode, methods=["POST"],
                      openapi_extra=body_schema(lmdeploy_protocol.EncodeRequest))
    app.add_api_route("/metrics", metrics_text, methods=["GET"])
    for path in ("/docs", "/") if docs_at_root else ("/docs",):
        app.add_api_route(path, docs, methods=["GET"], include_in_schema=False)
    schema = openapi_schema(app.routes)

    async def openapi(request: Request) -> Response:
        """The API page for programs."""
        return JSONResponse(schema)

    app.add_api_route("/openapi.json", openapi, methods=["GET"], include_in_schema=False)
    own = frozenset(str(getattr(route, "path", "")) for route in app.routes)
    add_fallbacks(app)
    # The last added is the outermost: refused requests are counted too.
    app.add_middleware(Guard, config=config, seen=classroom.see)
    app.add_middleware(CountRequests, metrics=metrics, routes=own)
    return app


def bare_app(config: ServerConfig) -> FastAPI:
    """An application without routes, whose errors are OpenAI's."""
    app = FastAPI(
        root_path=config.root_path, openapi_url=None, docs_url=None, redoc_url=None,
        # A redirect would be made of the Host header, whatever that says.
        redirect_slashes=False,
    )
    install_error_handlers(app)
    return app


def _add_status(
    app: FastAPI, backend: ChatBackend, classroom: Classroom, trouble: Callable[[], str]
) -> None:
    """/health for machines, /api/status for the page's status bar."""
    last: tuple[float, dict[str, Any]] | None = None

    async def health(request: Request) -> Response:
        """200 while the service can answer, else 503 and why."""
        if sentence := trouble():
            return JSONResponse(error_body(503, sentence, "unhealthy"), 503, {"Retry-After": "5"})
        return JSONResponse({"status": "ok"})

    async def status(request: Request) -> Response:
        """State, load and memory of the served model."""
        nonlocal last
        if last is None or time.monotonic() - last[0] >= STATUS_SECONDS:
            last = (time.monotonic(), asdict(await backend.status()))
        return JSONResponse({**last[1], "paused": classroom.paused})

    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route("/health", health, methods=["HEAD"], include_in_schema=False)
    app.add_api_route("/api/status", status, methods=["GET"])


def add_fallbacks(app: FastAPI) -> None:
    """Answer 404 and 405 of the API's paths here, as JSON: what matches no route of ours would
    go to the page that is mounted at "/"."""
    own = [route for route in app.routes if isinstance(route, Route)]

    async def fallback(request: Request) -> Response:
        near = [route for route in own if route.matches(request.scope)[0] is Match.PARTIAL]
        if near:
            allowed = sorted({method for route in near for method in route.methods or ()})
            raise HTTPException(
                405, f"{request.url.path} takes {' or '.join(allowed)}, not {request.method}.",
                {"Allow": ", ".join(allowed)})
        hint = "; see /docs" if any(route.path == "/docs" for route in own) else ""
        raise HTTPException(404, f"There is no {request.url.path} here{hint}.")

    for path in sorted({route.path for route in own} | {"/v1/{rest:path}", "/api/{rest:path}"}):
        app.add_route(path, fallback, methods=METHODS, include_in_schema=False)
