"""Bodies of /nodes/add and /nodes/remove, as LMDeploy's proxy has them."""

from __future__ import annotations

from backend.server.strict import Strict, described

# Of GET /nodes/status: another value means that the proxy was started again, and has forgotten
# nodes that were added by calls.
RUN_HEADER = "LMDesk-Proxy-Run"


class Status(Strict):
    """What is known of a node beforehand."""

    neutral = dict(unfinished=(0,), latency=([],))  # counted here
    no_effect = {"models": "the node itself is asked for its models"}

    speed: float | None = described(
        None, "requests a second, or any measure that all nodes share", "a number above 0", gt=0)


class AddRequest(Strict):
    """Body of POST /nodes/add."""

    parts = {"status": Status}

    url: str = described(..., "the api_server's", "text", max_length=2048)
    api_key: str | None = described(
        None, "what the node asks of its clients", "text", max_length=4096)
    status: Status | None = described(None, "what is known of it", "an object")

    @property
    def speed(self) -> float | None:
        return self.status.speed if self.status else None


class RemoveRequest(Strict):
    """Body of POST /nodes/remove."""

    url: str = described(..., "the node's", "text", max_length=2048)
