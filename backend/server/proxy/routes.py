"""The proxy's application: OpenAI's routes, passed on to nodes, and /nodes for their operator."""

from __future__ import annotations

import logging
import secrets
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from backend.admission import Account, Admission, Limits, Ticket
from backend.classroom import Caller
from backend.config import ServerConfig
from backend.errors import ModelNotFoundError, RemoteError, UserError
from backend.remote_http import normalise_url
from backend.server import sse
from backend.server.api import add_fallbacks, bare_app
from backend.server.auth import Guard, caller
from backend.server.body import parse_json, read_body, read_json
from backend.server.failures import describe, error_body
from backend.server.interactive import InteractiveRoutes
from backend.server.keys import key_id
from backend.server.listen import local_url, tunnel_line
from backend.server.proxy.interactive import PATH as INTERACTIVE, NodeSpeaker
from backend.server.proxy.nodes import Node, Nodes, Work
from backend.server.proxy.protocol import RUN_HEADER, AddRequest, RemoveRequest
from backend.server.proxy.upstream import Answer, NodeError, NodeLostError, Upstream
from backend.server.proxy.watch import Watch
from backend.server.sessions import Sessions
from backend.server.strict import parse

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3  # nodes that one request may be sent to
# Twice the queue of one api_server: the nodes have queues of their own behind this.
LIMITS = Limits(max_waiting=512)
# Answers that another node may do better than: its key is wrong, it does not have the model after
# all, it has too much to do, it is broken.
TRY_ANOTHER = {401, 403, 404, 429}


class AdminError(UserError):
    """A client's key where the operator's is needed."""

    status = 403
    code = "admin_key_needed"


class Proxy:
    """Spreads requests over nodes.

    Args:
        nodes: which there are, and how they are chosen.
        admin_key: of who may change them.
        node_key: what nodes are sent that were added without a key of their own.
        connect: makes a node's connections.
        sessions: keeps the conversations of /v1/chat/interactive.
    """

    def __init__(
        self,
        nodes: Nodes,
        admin_key: str,
        node_key: str = "",
        *,
        connect: Callable[[str, str], Upstream] = Upstream,
        sessions: Sessions | None = None,
    ) -> None:
        self.nodes = nodes
        self.own_url = ""
        self.admission = Admission(LIMITS)
        self._accounts: defaultdict[str, Account] = defaultdict(Account)  # one a key
        self._admin = key_id(admin_key)
        self._node_key = node_key
        self._connect = connect
        self._sessions = sessions or Sessions()
        self.watch = Watch(nodes)
        self.run_id = secrets.token_hex(8)  # see RUN_HEADER

    async def __aenter__(self) -> Proxy:
        await self.watch.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.watch.__aexit__(*error)

    def app(self, config: ServerConfig) -> FastAPI:
        """The application.

        Args:
            config: the final port; its keys are the clients' and the operator's.
        """
        self.own_url = local_url(config)
        app = bare_app(config)
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/encode"):
            app.add_route(path, self._forwarder(path), methods=["POST"])
        talks = InteractiveRoutes(NodeSpeaker(self.ask), self._admit, self._sessions)
        app.add_route(INTERACTIVE, talks.interactive, methods=["POST"])
        app.add_route(INTERACTIVE, talks.history, methods=["GET"])
        app.add_route("/v1/models", self._models, methods=["GET"])
        app.add_route("/v1/models/{model:path}", self._model, methods=["GET"])
        app.add_route("/health", self._health, methods=["GET", "HEAD"])
        app.add_route("/nodes/status", self._status, methods=["GET"])
        app.add_route("/nodes/add", self._add, methods=["POST"])
        app.add_route("/nodes/remove", self._remove, methods=["POST"])
        add_fallbacks(app)
        app.add_middleware(Guard, config=config)
        return app

    # Nodes

    def begin_with(self, urls: tuple[str, ...]) -> None:
        """Take in nodes that need not answer yet.

        Raises:
            UserError: a URL is none.
        """
        for url in map(normalise_url, urls):
            node = self.nodes.add(Node(url, healthy=False, detail="It has not answered yet."))
            self.watch.add(node, self._connect(url, self._node_key))

    def _require_admin(self, request: Request) -> None:
        if caller(request).id != self._admin:
            raise AdminError("This needs the proxy's admin key.",
                             "It was printed where the proxy was started.")

    async def _status(self, request: Request) -> Response:
        """All nodes, by URL."""
        self._require_admin(request)
        return JSONResponse({node.url: _describe(node) for node in self.nodes},
                            headers={RUN_HEADER: self.run_id})

    async def _add(self, request: Request) -> Response:
        """Take in a node that answers, or change one."""
        self._require_admin(request)
        body = parse(AddRequest, await read_json(request))
        url = normalise_url(body.url)
        if url == self.own_url:
            raise UserError("A proxy cannot be its own node.", field="url")
        upstream = self._connect(url, body.api_key or self._node_key)
        models = tuple(await sse.until_gone(request.receive, upstream.check()))
        node = self.nodes.add(Node(url, models, speed=body.speed))
        self.watch.add(node, upstream)
        return JSONResponse({url: _describe(node)})

    async def _remove(self, request: Request) -> Response:
        """Let a node go. LMDeploy takes the URL in the query."""
        self._require_admin(request)
        named = request.query_params.get("node_url")
        url = normalise_url(named or parse(RemoveRequest, await read_json(request)).url)
        node = self.nodes.get(url)
        self.nodes.remove(url)
        assert node is not None
        self.watch.remove(node)
        return JSONResponse({})

    # What clients see

    async def _health(self, request: Request) -> Response:
        """200 while there is a node that answers."""
        if any(node.healthy for node in self.nodes):
            return JSONResponse({"status": "ok"})
        body = error_body(503, "No node answers.", "unhealthy")
        return JSONResponse(body, 503, {"Retry-After": "5"})

    async def _models(self, request: Request) -> Response:
        """The models of all nodes."""
        data = [_model(name) for name in self.nodes.models()]
        return JSONResponse({"object": "list", "data": data})

    async def _model(self, request: Request) -> Response:
        """One of them, by its name."""
        name = request.path_params["model"]
        if name not in self.nodes.models():
            raise ModelNotFoundError(f"No node serves the model {name!r:.200}.", field="model")
        return JSONResponse(_model(name))

    def _forwarder(self, path: str) -> Callable[[Request], Awaitable[Response]]:
        async def forward(request: Request) -> Response:
            return await self._forward(request, path)

        return forward

    async def _forward(self, request: Request, path: str) -> Response:
        """A completion, by whatever node."""
        body = await read_body(request)
        data = parse_json(body)
        model, stream = data.get("model"), data.get("stream") is True
        if model is not None and not isinstance(model, str):
            raise UserError("model must be text.", field="model")
        async with AsyncExitStack() as stack:
            ticket = stack.enter_context(self._admit(caller(request)))
            answer, work = await sse.until_gone(
                request.receive, self.ask(path, body, model, stream, stack))
            ticket.started(0)
            if answer.chunks is None:
                return Response(answer.body, answer.status, answer.headers)
            return sse.EventStream(
                answer.body, _passed_on(answer, work), stack.pop_all(),
                media_type=answer.headers["content-type"])

    def _admit(self, who: Caller) -> Ticket:
        """One request of a caller."""
        return self.admission.admit(self._accounts[who.id], 1, LIMITS.max_per_caller)

    async def ask(
        self, path: str, body: bytes, model: str | None, stream: bool, stack: AsyncExitStack,
        preferred: object = None,
    ) -> tuple[Answer, Work]:
        """A node's answer: of the first that has one, or else the last one's refusal.

        Args:
            stack: closes the connection.
            preferred: the node to ask first, if it can answer.

        Raises:
            UserError: there is no node to ask; RemoteError: none answers.
        """
        tried: list[Node] = []
        lost: list[Node] = []
        refusal: tuple[Answer, Work] | None = None
        while len(tried) < MAX_ATTEMPTS:
            node = await self.watch.choose(model, tried, lost, preferred, patient=refusal is None)
            if node is None:
                break
            tried.append(node)
            async with AsyncExitStack() as attempt:
                work = attempt.enter_context(self.nodes.working(node))
                try:
                    answer = await self.watch[node].post(path, body, stream, attempt)
                except NodeLostError as error:
                    self.watch.mark_down(node, str(error))
                    lost.append(node)
                    continue
                except NodeError as error:
                    log.warning("A request goes to another node: %s", error)
                    continue
                if answer.status in (401, 403):  # the proxy's key: none of the client's business
                    log.warning("The node %s does not accept the key it is sent.", node.url)
                elif answer.status < 500 and answer.status not in TRY_ANOTHER:
                    if answer.status == 200 and answer.chunks is None:
                        work.done()
                    stack.push_async_exit(attempt.pop_all())
                    return answer, work
                else:
                    refusal = answer, work
        if refusal is None:
            raise RemoteError("No node could answer the request.", "Try again in a moment.")
        return refusal


def announcement(config: ServerConfig, admin_key: str, nodes: list[Node]) -> str:
    """What the terminal shows.

    Args:
        config: with the clients' keys alone.
    """
    url = local_url(config)
    answering = sum(node.healthy for node in nodes)
    lines = [
        f"LMDesk spreads requests over {answering} of {len(nodes)} nodes",
        f"  API     {url}/v1",
        f"  Admin   {admin_key}   (for {url}/nodes; clients may use it too)",
    ]
    if config.api_keys:
        lines.append(f"  Key     {config.api_keys[0]}   (for clients)")
    lines.append(f"  Tunnel  {tunnel_line(config)}   (on your own computer)")
    lines += [f"  {node.url}: {node.detail}" for node in nodes if not node.healthy]
    return "\n".join(lines)


async def _passed_on(answer: Answer, work: Work) -> AsyncGenerator[bytes, None]:
    """The rest of a stream, byte for byte. If it breaks off, the client is told by an event of its
    own: it has seen a part of the reply, so that no other node can give it again."""
    end = answer.body[-2:]
    assert answer.chunks is not None
    try:
        async for chunk in answer.chunks:
            end = (end + chunk)[-2:]
            yield chunk
    except NodeError as error:
        log.warning("A reply broke off: %s", error)
        told = RemoteError("The node that was answering was lost.", "Send the request again.")
        yield (b"" if end == b"\n\n" else b"\n\n") + sse.event(describe(told)[1])
    else:
        work.done()


def _describe(node: Node) -> dict[str, Any]:
    """What /nodes/status tells of a node: LMDeploy's fields, and how it is. Never its key."""
    return {
        "models": list(node.models), "unfinished": node.unfinished, "speed": node.speed,
        "latency": [round(seconds, 4) for _, seconds in node.latencies],
        "healthy": node.healthy, "detail": node.detail,
    }


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "lmdesk"}
