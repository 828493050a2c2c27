"""A real engine process over a fake model: `python -m tests.fake_worker [STEP_S] FD`.

STEP_S: seconds that a step takes at least; 0 if it is left out.
"""

from __future__ import annotations

import sys
from functools import partial

from backend.engine import worker
from tests.fake_model import fake_engine

if __name__ == "__main__":
    *pace, fd = sys.argv[1:]
    build = partial(fake_engine, step_s=float(pace[0]) if pace else 0.0)
    sys.exit(worker.main([fd], build))
