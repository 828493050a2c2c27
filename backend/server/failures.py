"""Errors as OpenAI's clients expect them: a status that tells, and {"error": {...}} as the body."""

from __future__ import annotations

import logging
import secrets
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from backend.errors import UserError

log = logging.getLogger(__name__)

class ClientGoneError(UserError):
    """The client closed the connection before it was answered. The status is nginx's; nobody is
    left to read it, but the metrics show it."""

    status = 499
    code = "client_closed_request"

    def __init__(self) -> None:
        super().__init__("The client closed the connection.")


# Seconds after which to try again, by code.
RETRY_AFTER_S = {
    "overloaded": 2, "rate_limit_exceeded": 2, "engine_not_ready": 5, "class_paused": 10}

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(
    status: int, message: str, code: str | None, param: str | None = None
) -> dict[str, Any]:
    """{"error": {...}} with the `type` that goes with `status`."""
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """(HTTP status, body) of an error. What no user can mend is logged, and not told."""
    if isinstance(error, UserError):
        return error.status, error_body(error.status, str(error), error.code, error.field)
    number = secrets.token_hex(8)
    log.error("Internal error %s", number, exc_info=error)
    return 500, error_body(
        500, f"An internal error occurred; the server's log has it under {number}.",
        "internal_error")


def error_response(error: Exception) -> JSONResponse:
    """`error` as a complete answer."""
    status, body = describe(error)
    headers = {}
    if (seconds := RETRY_AFTER_S.get(body["error"]["code"])) is not None:
        headers["Retry-After"] = str(seconds)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if body["error"]["code"] == "internal_error":
        # The server closes after an exception; who is not told sends its next request into that.
        headers["Connection"] = "close"
    return JSONResponse(body, status, headers)


def install_error_handlers(app: FastAPI) -> None:
    """Make every error that leaves a route one of these answers."""

    async def on_error(request: Request, error: Exception) -> JSONResponse:
        return error_response(error)

    async def on_http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        body = error_body(error.status_code, str(error.detail), code)
        return JSONResponse(body, error.status_code, error.headers)

    app.add_exception_handler(UserError, on_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_error)
