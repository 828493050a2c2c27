"""Listen, say where and how to get there, and serve until told to stop."""

from __future__ import annotations

import asyncio
import errno
import getpass
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from backend.classroom import Invitation
from backend.config import ServerConfig
from backend.errors import UserError

if TYPE_CHECKING:
    from backend.server.proxy.membership import Membership
    from backend.services import Services

PORTS_TO_TRY = 100
MAX_HEADER_BYTES = 16 << 10
SHUTDOWN_SECONDS = 5  # for replies that are being sent


def bind(config: ServerConfig, fixed_port: bool) -> tuple[socket.socket, ServerConfig]:
    """A listening socket for `config`, and the config with the port that it really got.

    Args:
        fixed_port: the port was asked for; else the next free one will do.

    Raises:
        UserError: the port is busy, not ours to use, or the address is not this machine's.
    """
    ports = (
        [config.server_port]
        if fixed_port
        else range(config.server_port, min(config.server_port + PORTS_TO_TRY, 65536))
    )
    for port in ports:
        try:
            return _bind(config.server_name, port, config)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise _sentence(config.server_name, port, error) from error
    last = (
        f"Port {config.server_port} is" if fixed_port else f"All ports {ports[0]}-{ports[-1]} are"
    )
    raise UserError(
        f"{last} in use on {config.server_name}.",
        "Stop the program that listens there, or choose another with --server-port.",
        field="server_port",
    )


def _bind(host: str, port: int, config: ServerConfig) -> tuple[socket.socket, ServerConfig]:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except UnicodeError as error:  # no name that a computer could have, such as ".."
        raise OSError(errno.EADDRNOTAVAIL, str(error)) from error
    # With the protocol named, asyncio turns off Nagle's algorithm for the connections accepted:
    # else the pieces of a stream wait up to 40 ms for one another's acknowledgement.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        # Listening at once: on Linux two sockets may be bound to a port while none listens.
        sock.listen(2048)
    except OSError:
        sock.close()
        raise
    return sock, replace(config, server_port=sock.getsockname()[1])


def _sentence(host: str, port: int, error: OSError) -> UserError:
    if error.errno == errno.EACCES:
        return UserError(
            f"Port {port} may be used by the administrator only.",
            "Choose one above 1023 with --server-port.",
            field="server_port",
        )
    return UserError(
        f"{host} is not an address of this machine.",
        "Use 127.0.0.1, or 0.0.0.0 for all addresses.",
        field="server_name",
    )


def local_url(config: ServerConfig) -> str:
    """The server's address for a client on this machine."""
    host = config.server_name.strip("[]")
    if host in ("0.0.0.0", "::", ""):
        host = "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{config.server_port}"


def tunnel_line(config: ServerConfig, user: str = "") -> str:
    """The command that brings the server's port to another computer by ssh.

    Host and port are those of the ssh session that this process was started in, if it was.

    Args:
        user: whose account on this machine; by default the one of this process.
    """
    connection = os.environ.get("SSH_CONNECTION", "").split()
    host, ssh_port = (
        (connection[2], connection[3]) if len(connection) == 4 else (socket.gethostname(), "22")
    )
    port = config.server_port
    option = "" if ssh_port == "22" else f" -p {ssh_port}"
    return f"ssh -CNL {port}:127.0.0.1:{port} {user or _user()}@{host}{option}"


def invitation(config: ServerConfig) -> Invitation | None:
    """What students need to come in; None where there is no class."""
    if not config.host_keys:
        return None
    return Invitation(tunnel_line(config, "USER"), local_url(config), config.api_keys[0])


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return "USER"


class _Server(uvicorn.Server):
    """Ctrl-C and SIGTERM end the serving, and nothing else.

    `leave` is called then, and `end_replies` when replies are still being written after
    SHUTDOWN_SECONDS.
    """

    def __init__(
        self, config: uvicorn.Config, end_replies: Callable[[], Awaitable[None]],
        leave: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(config)
        self._end_replies = end_replies
        self._leave = leave

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn would note the signal, to raise it once more when serving has ended; that would
        # cut off the orderly end of the engine.
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # What is open after its own timeout uvicorn just cancels; replies of an engine of ours
        # end in an error before that.
        async def end_late_replies() -> None:
            await asyncio.sleep(SHUTDOWN_SECONDS)
            await self._end_replies()

        if self._leave is not None:
            await self._leave()
        logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
        ending = asyncio.create_task(end_late_replies())
        await super().shutdown(sockets)
        ending.cancel()


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """Log filter: uvicorn shows a traceback for everything that it cancels."""
    return not record.exc_info or not isinstance(record.exc_info[1], asyncio.CancelledError)


async def serve_forever(
    app: FastAPI, sock: socket.socket, config: ServerConfig, services: Services, with_page: bool,
    membership: Membership | None = None,
) -> None:
    """Serve `app` until a signal comes; print the addresses once messages can be answered.

    Args:
        membership: of a proxy; it begins when messages can be answered, and ends first.

    Raises:
        UserError: the model cannot be loaded.
    """

    async def announce() -> str:
        try:
            what = await services.ready()
        except UserError as error:
            if not with_page:
                raise
            what = f"no model yet: {error}"  # the page can load another
        if membership is not None:
            membership.begin()
        return announcement(
            config, what, with_page, not services.remote, membership.url if membership else "")

    async def leave() -> None:
        if membership is not None:
            await membership.leave()

    seconds = SHUTDOWN_SECONDS * (1 if services.remote else 2)
    await serve_until_told(app, sock, announce, services.stop, seconds, leave)


async def serve_until_told(
    app: FastAPI,
    sock: socket.socket,
    announce: Callable[[], Awaitable[str]],
    end_replies: Callable[[], Awaitable[None]],
    shutdown_seconds: int,
    leave: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Serve `app` until a signal comes.

    Args:
        announce: what to print, once there is something to be had.
        end_replies: called when replies go on for too long after the signal.
        shutdown_seconds: when open connections are cut off.
        leave: called after the signal, while requests are still answered.

    Raises:
        UserError: by `announce`; ends the serving.
    """
    server = _Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_graceful_shutdown=shutdown_seconds,
        ),
        end_replies,
        leave,
    )

    async def say() -> None:
        try:
            print(await announce(), flush=True)
        except UserError:
            server.should_exit = True
            raise

    await asyncio.sleep(0)  # Ctrl-C while the page was being built ends here, not amid the start
    announcing = asyncio.create_task(say())
    await server.serve(sockets=[sock])
    if announcing.done():
        announcing.result()
    announcing.cancel()


def announcement(
    config: ServerConfig, what: str, with_page: bool, with_api: bool, proxy: str = ""
) -> str:
    """What the terminal shows: what is served, where, the way there, and the key."""
    url = local_url(config)
    lines = [f"LMDesk serves {what}"]
    if with_page:
        lines.append(f"  Page    {url}")
    if with_api:
        lines.append(f"  API     {url}/v1   (described at {url}/docs)")
    if proxy:
        lines.append(f"  Proxy   {proxy}   (this server is to be a node of it)")
    if config.host_keys:
        lines.append(f"  Host    {config.host_keys[0]}   (your key; keep it to yourself)")
        lines.append(f"  Class   {config.api_keys[0]}   (the students' key)")
    elif config.api_keys:
        lines.append(f"  Key     {config.api_keys[0]}   (clients of yours on this machine find it)")
    lines.append(f"  Tunnel  {tunnel_line(config)}   (on your own computer; then open {url})")
    return "\n".join(lines)
