"""Request bodies: bounded while they are read, then parsed as strict JSON.

Python's own `json` accepts NaN, 1e400, lone surrogates and any depth. Each of these has made a
server answer 500 later on, so all are refused here, before anything else looks at the body.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

from starlette.requests import ClientDisconnect, Request

from backend.errors import UserError
from backend.server.failures import ClientGoneError

MAX_BODY_BYTES = 2_000_000
MAX_DEPTH = 64
MAX_FIELDS = 1024  # of one object; this and the next bound the work of finding what is wrong
MAX_NODES = 20_000  # objects and lists together
READ_SECONDS = 30.0
INLINE_BYTES = 1 << 16  # larger bodies are parsed in a thread, away from everybody's streams


class BodyTooLargeError(UserError):
    """The request body exceeds `MAX_BODY_BYTES`."""

    status = 413
    code = "request_too_large"


class BodyTimeoutError(UserError):
    """The client did not send its body in time."""

    status = 408
    code = "request_timeout"


async def read_body(request: Request, limit: int = MAX_BODY_BYTES) -> bytes:
    """The body's bytes.

    What exceeds `limit` is read on for a while and dropped: a client that is still sending when
    the connection closes would see a broken pipe instead of the 413.

    Raises:
        BodyTooLargeError, BodyTimeoutError, ClientGoneError: see there.
    """
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(READ_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limit:
                    chunks.append(chunk)
                elif size > 8 * limit:
                    break
    except ClientDisconnect:
        raise ClientGoneError from None
    except TimeoutError:
        raise BodyTimeoutError(
            f"The request body did not arrive within {READ_SECONDS:.0f} seconds.") from None
    if size > limit:
        raise BodyTooLargeError(f"The request body has more than {limit} bytes.")
    return b"".join(chunks)


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        UserError: too large, no JSON, no object, or with values that no JSON can hold.
    """
    body = await read_body(request)
    if len(body) <= INLINE_BYTES:
        return parse_json(body)
    return await asyncio.to_thread(parse_json, body)


def parse_json(body: bytes) -> dict[str, Any]:
    """`body` as a JSON object; see `read_json`."""
    if not body.strip():
        raise UserError("The request body is empty.", "Send a JSON object.")
    try:
        value = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"The request body is not valid UTF-8: byte {error.start} is wrong.") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"The request body is not valid JSON: {error.msg} at line {error.lineno}, "
            f"column {error.colno}.") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # Python refuses to convert thousands of digits
        raise _too_large_number() from None
    if not isinstance(value, dict):
        raise UserError("The request body must be a JSON object.")
    _check_values(value)
    return value


def _too_deep() -> UserError:
    return UserError(f"The request body is nested deeper than {MAX_DEPTH} levels.")


def _too_large_number() -> UserError:
    return UserError("The request body holds a whole number of more than 64 bits.")


def _check_values(root: dict[str, Any]) -> None:
    """Refuse what Python's parser lets through although it is no JSON or no Unicode text."""
    todo: list[tuple[Any, int]] = [(root, 1)]
    nodes = 0
    while todo:
        node, depth = todo.pop()
        nodes += 1
        if nodes + len(todo) > MAX_NODES:
            raise UserError(
                f"The request body has more than {MAX_NODES} objects and lists.")
        if depth > MAX_DEPTH:
            raise _too_deep()
        children = node
        if isinstance(node, dict):
            if len(node) > MAX_FIELDS:
                raise UserError(f"The request body has an object of more than {MAX_FIELDS} fields.")
            for key in node:
                _check_text(key)
            children = node.values()
        for child in children:
            if isinstance(child, str):
                _check_text(child)
            elif isinstance(child, (dict, list)):
                todo.append((child, depth + 1))
            elif isinstance(child, int):  # covers booleans, which are small
                if not -(1 << 63) <= child < 1 << 63:
                    raise _too_large_number()
            elif isinstance(child, float) and not math.isfinite(child):
                raise UserError(
                    "The request body holds a number that is not finite (NaN, Infinity, 1e400).")


def _check_text(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            "The request body holds half of a surrogate pair, which is not Unicode text.",
            "Send both halves, or the character itself.") from None
