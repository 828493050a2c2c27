"""Which nodes answer: each is asked all the time, and a request may wait for one to come back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from backend.errors import EngineNotReadyError, UserError
from backend.server.proxy.nodes import Node, Nodes
from backend.server.proxy.upstream import Upstream

log = logging.getLogger(__name__)

CHECK_INTERVAL_SECONDS = 1.0  # between two checks of a node
# That a request waits for a node that is gone: long enough for a server that is started again with
# a small model, short enough for somebody who waits in vain.
RETURN_SECONDS = 10.0


class Watch:
    """Asks every node again and again whether it can answer, each on its own: one that hangs does
    not keep the others waiting.

    Args:
        nodes: those of the proxy.
    """

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._upstreams: dict[Node, Upstream] = {}
        self._asking: dict[Node, asyncio.Task[None]] = {}
        self._open = False
        self._returned = asyncio.Event()

    async def __aenter__(self) -> Watch:
        self._open = True
        for node in self._upstreams:
            self._begin(node)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._open = False
        for task in self._asking.values():
            task.cancel()
        await asyncio.gather(*self._asking.values(), return_exceptions=True)

    def __getitem__(self, node: Node) -> Upstream:
        """How to talk to a node."""
        return self._upstreams[node]

    def add(self, node: Node, upstream: Upstream) -> None:
        """Watch a node, or talk to it in another way from now on."""
        known = node in self._upstreams
        self._upstreams[node] = upstream
        if node.healthy:
            self._wake()
        if self._open and not known:
            self._begin(node)

    def remove(self, node: Node) -> None:
        """Leave it alone."""
        del self._upstreams[node]
        if (task := self._asking.pop(node, None)) is not None:
            task.cancel()

    async def check_all(self) -> None:
        """Ask all nodes at once whether they can answer, and for which models."""
        await asyncio.gather(*(self._check(*watched) for watched in self._upstreams.items()))

    def mark_down(self, node: Node, why: str) -> None:
        """No requests for it until it answers a check."""
        if node.healthy:
            log.warning("The node %s gets no requests until it answers: %s", node.url, why)
        node.healthy, node.detail = False, why

    async def choose(
        self, model: str | None, tried: Sequence[Node], lost: Sequence[Node], preferred: object,
        patient: bool,
    ) -> Node | None:
        """The node for the next attempt; None if there is no other to try. See `Nodes.choose`.

        Args:
            tried: nodes that have failed the request already.
            lost: those of them that were gone; one that has come back is as good as another.
            patient: wait for a node to come back if none is left, `RETURN_SECONDS` at most.

        Raises:
            UserError: as `Nodes.choose` does.
        """
        clock = asyncio.get_running_loop().time
        until = clock() + (RETURN_SECONDS if patient else 0.0)
        while True:
            returned = self._returned
            failed = [node for node in tried if not (node in lost and node.healthy)]
            left = until - clock()
            try:
                node = self._nodes.choose(model, failed, preferred)
            except EngineNotReadyError:
                if left <= 0:
                    raise
            else:
                if node is not None or not lost or left <= 0:
                    return node
            try:
                await asyncio.wait_for(returned.wait(), left)
            except TimeoutError:
                pass  # a last look

    def _begin(self, node: Node) -> None:
        self._asking[node] = asyncio.create_task(self._check_for_ever(node))

    async def _check_for_ever(self, node: Node) -> None:
        while True:
            try:
                await self._check(node, self._upstreams[node])
            except Exception:  # one bad round must not end all checks
                log.exception("The node %s could not be checked", node.url)
            await asyncio.sleep(CHECK_INTERVAL_SECONDS)

    async def _check(self, node: Node, upstream: Upstream) -> None:
        try:
            node.models = tuple(await upstream.check())
        except UserError as error:
            self.mark_down(node, str(error))
        else:
            if not node.healthy:
                log.warning("The node %s answers.", node.url)
                node.healthy, node.detail = True, ""
                self._wake()

    def _wake(self) -> None:
        """All requests that wait look again."""
        self._returned.set()
        self._returned = asyncio.Event()
