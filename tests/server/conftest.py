from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.support import Served, serve


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """A server without keys, shared; who changes its state makes one of their own."""
    with serve() as running:
        yield running
