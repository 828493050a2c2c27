"""An api_server that joins a proxy by itself, and leaves it when it stops: --proxy-url."""

from __future__ import annotations

import asyncio
import logging
import socket
from urllib.parse import urlsplit

from backend.config import ServerConfig
from backend.errors import AuthError, RemoteError, UserError
from backend.remote import NO_SERVER, RemoteChat
from backend.remote_http import is_loopback_url
from backend.server.auth import is_loopback
from backend.server.listen import local_url
from backend.server.proxy.protocol import RUN_HEADER

log = logging.getLogger(__name__)

CHECK_SECONDS = 2.0
LEAVE_SECONDS = 3.0
ANY = ("0.0.0.0", "::", "")


class Membership:
    """Keeps a server among a proxy's nodes.

    Args:
        proxy_url: as people write it.
        proxy_key: its admin key; "" takes the key file of a proxy on this machine.
        server: the final port and keys.

    Raises:
        UserError: the URL is none, or the proxy could not reach the server.
    """

    def __init__(self, proxy_url: str, proxy_key: str, server: ServerConfig) -> None:
        self._proxy = RemoteChat(proxy_url, proxy_key)
        self.url = self._proxy.url
        self.own_url = reachable_url(server, self.url)
        self._own_key = next(iter(server.api_keys), "")
        self._joined = False
        self._run = ""  # of the proxy, when it was joined
        self._keeping: asyncio.Task[None] | None = None

    async def check(self) -> None:
        """Insist that the proxy, if it is there, is one and takes the key.

        Raises:
            UserError: it does not.
        """
        try:
            await self._ask()
        except AuthError:
            raise
        except UserError as error:
            if error.code == NO_SERVER:
                raise
            log.warning("%s It is asked again until it answers.", error.message)

    def begin(self) -> None:
        """Join, once the server can answer; and again whenever the proxy was away."""
        self._keeping = asyncio.create_task(self._keep())

    async def leave(self) -> None:
        """No more requests, please. The proxy may be away."""
        if self._keeping is None:
            return
        self._keeping.cancel()
        await asyncio.gather(self._keeping, return_exceptions=True)
        if self._joined:
            try:
                async with asyncio.timeout(LEAVE_SECONDS):
                    await self._post("/nodes/remove", url=self.own_url)
            except (UserError, TimeoutError) as error:
                log.warning("The proxy at %s was not told: %s", self.url, error)

    async def _keep(self) -> None:
        trouble = ""
        while True:
            try:
                run = await self._ask()
                # One that was started again has forgotten its nodes. Whoever was removed by its
                # operator stays out.
                if not self._joined or run != self._run:
                    await self._post("/nodes/add", url=self.own_url, api_key=self._own_key or None)
                    self._joined, self._run = True, run
                    log.warning("This server is a node of the proxy at %s.", self.url)
                trouble = ""
            except UserError as error:
                self._joined = False
                if str(error) != trouble:
                    log.warning("Not a node of the proxy at %s now: %s", self.url, error)
                trouble = str(error)
            await asyncio.sleep(CHECK_SECONDS)

    async def _ask(self) -> str:
        """Which run of the proxy is there; "" where it does not say, as LMDeploy's."""
        try:
            return (await self._proxy.get("/nodes/status")).headers.get(RUN_HEADER, "")
        except UserError as error:
            raise self._sentence(error) from error

    async def _post(self, path: str, **body: str | None) -> None:
        try:
            async with self._proxy.post_for_lines(path, body) as lines:
                async for _ in lines:
                    pass
        except UserError as error:
            raise self._sentence(error) from error

    def _sentence(self, error: UserError) -> UserError:
        """`error`, which speaks of an api_server."""
        if isinstance(error, AuthError):
            verb = "does not accept the key" if self._proxy.key() else "needs a key"
            return AuthError(f"The proxy at {self.url} {verb}.",
                             "Give its admin key, which it printed at its start, by --proxy-key.",
                             field="proxy_key")
        if error.code == NO_SERVER:
            found = RemoteError(f"What answers at {self.url} is no proxy.",
                                "Start one: python app.py serve proxy", field="proxy_url")
            found.code = NO_SERVER
            return found
        error.message = error.message.replace("api_server", "proxy")
        return error


def reachable_url(server: ServerConfig, proxy_url: str) -> str:
    """Where the proxy finds the server.

    Raises:
        UserError: nowhere.
    """
    only_here = is_loopback(server.server_name)
    if is_loopback_url(proxy_url) and (only_here or server.server_name in ANY):
        return local_url(server)
    if only_here:
        raise UserError(
            f"The proxy at {proxy_url} cannot reach this server, which listens on "
            f"{server.server_name} only.",
            "Give --server-name 0.0.0.0, or this machine's address.", field="server_name")
    if server.server_name not in ANY:
        return local_url(server)
    host = _address_towards(urlsplit(proxy_url).hostname or "")
    return f"http://{f'[{host}]' if ':' in host else host}:{server.server_port}"


def _address_towards(host: str) -> str:
    """This machine's address on the way to `host`. Nothing is sent.

    Raises:
        UserError: there is no way.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as sock:
            sock.connect(address)
            return str(sock.getsockname()[0])
    except OSError as error:
        raise UserError(f"There is no way to the proxy's machine {host}: {error.strerror}.",
                        "Name the address that the proxy reaches by --server-name.",
                        field="proxy_url") from error
