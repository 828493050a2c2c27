from __future__ import annotations

from collections.abc import Iterator

import pytest

from backend.server.proxy import watch
from tests.server.proxy_support import RunningProxy, stand_ins
from tests.server.support import Served, serve
from tests.stand_in import StandIn


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """A server without keys, shared; who changes its state makes one of their own."""
    with serve() as running:
        yield running


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies ask their nodes all the time, and requests do not wait long for one that is gone."""
    monkeypatch.setattr(watch, "CHECK_INTERVAL_SECONDS", 0.02)
    monkeypatch.setattr(watch, "RETURN_SECONDS", 0.1)


@pytest.fixture
def proxy(often: None) -> Iterator[RunningProxy]:
    """A proxy without nodes."""
    with RunningProxy() as running:
        yield running
        running.assert_idle()


@pytest.fixture
def pair(proxy: RunningProxy) -> Iterator[tuple[RunningProxy, StandIn, StandIn]]:
    """A proxy and two nodes; the first gets all requests, as long as it can answer."""
    with stand_ins(2) as (first, second):
        proxy.add(first.url)
        proxy.add(second.url)
        proxy.prefer(first.url)
        yield proxy, first, second
        proxy.assert_idle()
