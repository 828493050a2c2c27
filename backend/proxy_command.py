"""`python app.py serve proxy`: its command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

from backend import config, keyfile
from backend.command_line import add_command as add_parser
from backend.config import ServerConfig, option
from backend.errors import UserError

DEFAULT_PORT = 8000  # LMDeploy's


@dataclass(frozen=True)
class ProxyConfig:
    """How `serve proxy` spreads requests over api_servers, its nodes."""

    strategy: str = option(
        "min_expected_latency",
        "which node gets a request: min_expected_latency takes the one with least work for its "
        "speed, min_observed_latency the one that was fastest lately, random any, by speed",
        choices=("min_expected_latency", "min_observed_latency", "random"),
    )
    nodes: tuple[str, ...] = option((), "api_servers to begin with: URLs, by spaces")
    node_key: str = option("", "API key that these nodes ask for")
    admin_key: str = option("", "key for adding and removing nodes; default: a random one")


@dataclass(frozen=True)
class MembershipConfig:
    """The proxy that the server joins as a node while it runs."""

    proxy_url: str = option("", "join the proxy (serve proxy) at this URL, and leave it at the end")
    proxy_key: str = option("", "its admin key; a proxy of yours on this machine needs none")

    def __post_init__(self) -> None:
        if self.proxy_key and not self.proxy_url:
            raise UserError("--proxy-key is for a proxy that none names.",
                            "Name it by --proxy-url.", field="proxy_url")


def add_command(kinds: Any) -> None:
    """The parser of `serve proxy`."""
    text = "one address for many api_servers: docs/proxy.md"
    examples = ("serve proxy --nodes http://10.0.0.11:23333 http://10.0.0.12:23333",
                "serve proxy --server-name 0.0.0.0 --strategy min_observed_latency")
    add_parser(kinds, "proxy", text, run, ServerConfig, ProxyConfig, examples=examples)


async def run(args: argparse.Namespace) -> int:
    """Serve until told to stop."""
    from backend.server.auth import resolve_keys
    from backend.server.listen import SHUTDOWN_SECONDS, bind, serve_until_told
    from backend.server.proxy.nodes import Nodes
    from backend.server.proxy.routes import Proxy, announcement

    settings = config.from_namespace(ProxyConfig, args)
    server = config.from_namespace(ServerConfig, args, server_port=DEFAULT_PORT)
    if server.host_keys:
        raise UserError("A proxy has no class, so it takes no --host-keys.",
                        "Its operator's key is --admin-key.", field="host_keys")
    if settings.admin_key in server.api_keys:
        raise UserError("The admin key is one of the clients' keys too.", "Take another.",
                        field="admin_key")
    admin_key = settings.admin_key or keyfile.new_key()
    sock, server = bind(server, hasattr(args, "server_port"))
    # Whoever may add a node reads what everybody asks: so there is a key even on loopback.
    keyed = resolve_keys(replace(server, api_keys=(*server.api_keys, admin_key)))
    if not settings.admin_key:
        keyfile.write_key(server.server_port, admin_key)
    proxy = Proxy(Nodes(settings.strategy), admin_key, settings.node_key)
    proxy.begin_with(settings.nodes)

    async def announce() -> str:
        await proxy.watch.check_all()
        return announcement(server, admin_key, list(proxy.nodes))

    async def nothing() -> None:
        """Replies are the nodes'; the connections are cut off."""

    async with proxy:
        await serve_until_told(proxy.app(keyed), sock, announce, nothing, SHUTDOWN_SECONDS)
    return 0
