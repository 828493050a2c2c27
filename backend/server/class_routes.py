"""/api/class: what a host sees of the class and changes, for servers without the page, too."""

from __future__ import annotations

from dataclasses import asdict, replace

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from backend.classroom import MOST_REPLIES, MOST_TOKENS, Classroom, require_host
from backend.server.auth import caller
from backend.server.body import read_json
from backend.server.docs import body_schema
from backend.server.strict import Strict, described, parse


class ClassChange(Strict):
    """Body of POST /api/class; what is left out stays."""

    paused: bool | None = described(None, "students get no new replies", "true or false")
    max_replies: int | None = described(
        None, "replies that a student may have open at a time",
        f"a whole number from 1 to {MOST_REPLIES}", ge=1, le=MOST_REPLIES)
    max_tokens: int | None = described(
        None, "longest reply to a student in tokens; null: what the context leaves",
        f"a whole number from 1 to {MOST_TOKENS}, or null", ge=1, le=MOST_TOKENS)


def add_class_routes(app: FastAPI, classroom: Classroom) -> None:
    """Add them, if there is a class."""
    if not classroom.has_hosts:
        return

    async def show(request: Request) -> Response:
        """Who is in the class, what they do, pause and limits; for hosts."""
        return JSONResponse(asdict(classroom.snapshot(caller(request))))

    async def change(request: Request) -> Response:
        """Pause the class, or set what a student may have; for hosts."""
        host = caller(request)
        require_host(host)  # before the body, which is none of a student's business
        body = parse(ClassChange, await read_json(request))
        named = body.model_fields_set & {"max_replies", "max_tokens"}
        limits = {name: getattr(body, name) for name in named}
        classroom.set_limits(host, replace(classroom.student_limits, **limits))
        if body.paused is not None:
            (classroom.pause if body.paused else classroom.resume)(host)
        return await show(request)

    app.add_api_route("/api/class", show, methods=["GET"])
    app.add_api_route("/api/class", change, methods=["POST"],
                      openapi_extra=body_schema(ClassChange))
