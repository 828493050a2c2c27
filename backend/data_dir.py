"""Where the user's own things are kept: models, settings, jobs, measurements."""

from __future__ import annotations

import os
from pathlib import Path

from backend.errors import UserError


def data_dir() -> Path:
    """$LMDESK_HOME, else the user's data directory for us. It may not exist yet.

    Raises:
        UserError: the user has no home directory.
    """
    if home := os.environ.get("LMDESK_HOME"):
        return Path(home).expanduser().absolute()
    import platformdirs  # only here: benchmarks run where it is not installed

    try:
        return platformdirs.user_data_path("lmdesk")
    except RuntimeError:
        raise UserError(
            "Nothing can be kept, because this user has no home directory.", "Set LMDESK_HOME."
        ) from None


def results_dir() -> Path:
    """Where models that the page makes are put. Raises as `data_dir`."""
    return data_dir() / "results"
