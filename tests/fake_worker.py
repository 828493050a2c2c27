"""A real engine process over a fake model: `python -m tests.fake_worker FD`."""

from __future__ import annotations

import sys

from backend.engine import worker
from tests.fake_model import fake_engine

if __name__ == "__main__":
    sys.exit(worker.main(sys.argv[1:], fake_engine))
