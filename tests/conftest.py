"""What holds for all tests.

Before any test imports Triton: without a GPU its kernels are interpreted, and must be from the
start, because Triton's own functions are made for one or the other when it is imported.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.ops import gpu_device

assert gpu_device.DEVICE

# Ctrl-C is ignored by what a shell runs in the background, and so by all that it starts in turn.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says how busy the machine is, and nothing of the code.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def home_of_nobody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept for a user goes to folders of this process, and is nobody else's, nor yours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LMDESK_HOME", raising=False)
        for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp("home")))
        yield
