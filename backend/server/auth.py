"""Who may come in: one guard around the whole application, page included.

Everything is denied but /health and /login, by exact path; a route that someone adds tomorrow is
guarded without knowing of it. Nothing here believes the Host header: the path is the scope's.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import replace
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request, cookie_parser
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from backend import keyfile
from backend.classroom import SCOPE_KEY, Caller, caller_of, clean_name
from backend.config import ServerConfig, validate
from backend.errors import AuthError, UserError
from backend.server.body import read_body
from backend.server.failures import error_body, error_response
from backend.server.keys import Keys, Pass
from backend.server.login_page import login_page

MIN_KEY_CHARS = 8
NEW_KEY = "new"  # in place of a host's key: what is on a command line, others on the machine read
MAX_LOGIN_BYTES = 4096
COOKIE_SECONDS = 30 * 24 * 3600
API_PATHS = ("/v1", "/api", "/metrics")
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:/@?#\s]+)(:\d{1,5})?", re.IGNORECASE)


def is_loopback(server_name: str) -> bool:
    """Whether only this machine can reach a server that listens on `server_name`."""
    if server_name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(server_name.strip("[]")).is_loopback
    except ValueError:
        return False  # a name; where it leads is not for us to know


def resolve_keys(config: ServerConfig) -> ServerConfig:
    """`config` with keys if it needs any: open doors beyond loopback get a new random key, and so
    do students where there are hosts, and hosts whose key is to be a new one.

    A new one of `api_keys` is written for the user's own clients (see `backend.keyfile`), under
    `config.server_port`, which must be the final one.

    Raises:
        UserError: a key is too short, or has characters that a header cannot carry; or one is for
            hosts and students.
    """
    validate(config)
    config = replace(config, host_keys=tuple(
        keyfile.new_key() if key == NEW_KEY else key for key in config.host_keys))
    for field in ("api_keys", "host_keys"):
        for key in getattr(config, field):
            if len(key) < MIN_KEY_CHARS or not all("!" <= char <= "~" for char in key):
                raise UserError(
                    "An API key is too short or has unusual characters.",
                    f"Use at least {MIN_KEY_CHARS} ASCII letters, digits and signs, without "
                    "spaces.", field=field)
    if set(config.api_keys) & set(config.host_keys):
        raise UserError("A key is given for hosts and for students.",
                        "Give --host-keys of their own, which students do not know.",
                        field="host_keys")
    if config.api_keys or (is_loopback(config.server_name) and not config.host_keys):
        return config
    key = keyfile.new_key()
    keyfile.write_key(config.server_port, key)
    return replace(config, api_keys=(key,))


def caller(request: Request) -> Caller:
    """Who sent the request."""
    return caller_of(request.scope)


def _split_host(host: str) -> str | None:
    """Lower-case host without its port; None if it is malformed."""
    match = _HOST.fullmatch(host)
    return match[1].lower() if match else None


class Guard:
    """The ASGI middleware. It leaves the `Caller` in the request's scope.

    Args:
        seen: told of everybody who comes in.

    Raises:
        UserError: the server would be open to others without a key.
    """

    def __init__(
        self, app: ASGIApp, config: ServerConfig,
        seen: Callable[[Caller], object] = lambda caller: None,
    ) -> None:
        if not config.api_keys and (config.host_keys or not is_loopback(config.server_name)):
            raise UserError(
                f"Listening on {config.server_name} needs an API key.", "Give --api-keys.",
                field="api_keys")
        self._app = app
        self._seen = seen
        self._keys = Keys(config.api_keys, config.host_keys)
        self._hosts = {"localhost", "127.0.0.1", "[::1]", config.server_name.lower(),
                       f"[{config.server_name.lower()}]"}
        # Servers behind tunnels share the origin 127.0.0.1; their cookies must not.
        self._cookie_name = f"lmdesk_{config.server_port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":  # no route of ours is a websocket
            await send({"type": "websocket.close", "code": 1008})
        else:
            refusal = await self._enter(scope, receive)
            await (refusal or self._app)(scope, receive, send)

    async def _enter(self, scope: Scope, receive: Receive) -> Response | None:
        """The answer to give instead of the application's; None lets the request in."""
        path, method, headers = _route_path(scope), scope["method"], Headers(scope=scope)
        if path == "/health" and method in ("GET", "HEAD"):
            return None
        if not self._keys and not self._own_host(headers):
            return JSONResponse(error_body(
                421, "The request's Host is not this server's.", "wrong_host"), 421)
        if path == "/login":
            return await self._login(Request(scope, receive))
        if path == "/logout":
            return self._logout(scope, headers)
        found, by_cookie = self._who(headers)
        if self._keys and found is None:
            return await self._refuse(scope, path, headers)
        # What a browser sends along by itself proves nothing about whose page made it do so.
        if method not in SAFE_METHODS and (by_cookie or not self._keys) and (
                not self._own_origin(headers)):
            return _wrong_origin()
        scope[SCOPE_KEY] = self._keys.caller(found) if found else Caller()
        self._seen(scope[SCOPE_KEY])
        return None

    def _who(self, headers: Headers) -> tuple[Pass | None, bool]:
        """(with what somebody comes, whether it is a cookie)."""
        for authorization in headers.getlist("authorization"):
            scheme, _, key = authorization.partition(" ")
            if scheme.lower() == "bearer":  # other schemes are a proxy's business
                return self._keys.find(key.strip()), False
        return self._cookie(headers), True

    def _cookie(self, headers: Headers) -> Pass | None:
        for header in headers.getlist("cookie"):
            value = cookie_parser(header).get(self._cookie_name, "")
            if (found := self._keys.find_signed(value)) is not None:
                return found
        return None

    async def _refuse(self, scope: Scope, path: str, headers: Headers) -> Response:
        """401, as JSON to programs and as the login form to browsers; or the way in by ?key=."""
        wants_page = scope["method"] in ("GET", "HEAD") and "text/html" in headers.get("accept", "")
        if not wants_page or any(path == p or path.startswith(p + "/") for p in API_PATHS):
            given = "authorization" in headers
            return error_response(AuthError(
                "The API key is wrong." if given else "An API key is needed.",
                "Send it as the header Authorization: Bearer <key>."))
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        keys = [value for name, value in query if name == "key"]
        if path != "/" or not keys:
            return self._form(headers, 401, depth=path.count("/") - 1)
        rest = urlencode([(name, value) for name, value in query if name != "key"])
        scope["query_string"] = rest.encode("latin-1")  # the access log must not have the key
        found = self._keys.find(keys[0].strip())
        if found is None:
            return self._form(headers, 401, wrong="key")
        # In a class, a guest first, who may take a name at /login.
        return self._welcome(scope, self._keys.enter(found), f"./?{rest}" if rest else "./")

    async def _login(self, request: Request) -> Response:
        """The form, and what it sends: a key and, in a class, a name. Who is in already may leave
        out the key, and has another name then."""
        if not self._keys:
            return RedirectResponse("./", 303)
        headers = request.headers
        if request.method in ("GET", "HEAD"):
            return self._form(headers)
        if request.method != "POST":
            return JSONResponse(
                error_body(405, "Method Not Allowed", "method_not_allowed"), 405,
                {"Allow": "GET, POST"})
        if not self._own_origin(headers):
            return _wrong_origin()
        try:
            body = await read_body(request, MAX_LOGIN_BYTES)
        except UserError as error:
            return error_response(error)
        form = dict(parse_qsl(body.decode("latin-1")))
        before, key = self._cookie(headers), form.get("key", "").strip()
        found = self._keys.find(key) if key else before
        if found is None:
            return self._form(headers, 401, wrong="key")
        name = ""
        if self._keys.for_class:
            try:
                name = clean_name(form.get("name", ""))
            except UserError:
                return self._form(headers, 400, wrong="name")
        return self._welcome(request.scope, self._keys.enter(found, name, before), "./")

    def _logout(self, scope: Scope, headers: Headers) -> Response:
        """Forget the cookie."""
        if scope["method"] != "POST":
            return JSONResponse(
                error_body(405, "Method Not Allowed", "method_not_allowed"), 405,
                {"Allow": "POST"})
        if not self._own_origin(headers):
            return _wrong_origin()
        response = RedirectResponse("./login", 303)
        response.delete_cookie(self._cookie_name, httponly=True, samesite="lax")
        return response

    def _form(
        self, headers: Headers, status: int = 200, *, depth: int = 0, wrong: str = ""
    ) -> Response:
        inside = self._cookie(headers)
        page = login_page(
            headers.get("accept-language", ""), depth, wrong,
            name=(inside.name if inside else "") if self._keys.for_class else None,
            own_key=self._keys.signed(inside) if inside and self._keys.for_class else "")
        demand = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        return HTMLResponse(page, status, {"Cache-Control": "no-store", **demand})

    def _welcome(self, scope: Scope, entered: Pass, target: str) -> Response:
        """The cookie and the way on. `target` is relative: a proxy's prefix in front of our paths
        stays."""
        response = RedirectResponse(target, 303, {"Referrer-Policy": "no-referrer"})
        response.set_cookie(
            self._cookie_name, self._keys.signed(entered), max_age=COOKIE_SECONDS, httponly=True,
            samesite="lax", secure=scope["scheme"] == "https")
        return response

    def _own_host(self, headers: Headers) -> bool:
        hosts = headers.getlist("host")
        return len(hosts) == 1 and _split_host(hosts[0]) in self._hosts

    def _own_origin(self, headers: Headers) -> bool:
        """Whether the page that sent this, if one did, came from here."""
        for origin in headers.getlist("origin"):
            try:
                netloc = urlsplit(origin).netloc.lower()
            except ValueError:
                return False
            host = _split_host(netloc)
            if host is None or (
                    host not in self._hosts and netloc != headers.get("host", "").lower()):
                return False
        return True


def _wrong_origin() -> JSONResponse:
    return JSONResponse(error_body(
        403, "The request came from a page of another origin.", "wrong_origin"), 403)


def _route_path(scope: Scope) -> str:
    """The path as the router sees it: without the prefix that a proxy left in place."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "")
    return path[len(prefix):] if prefix and path.startswith(prefix + "/") else path
