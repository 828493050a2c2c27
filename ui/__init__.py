"""The page: Gradio only, no torch and no business logic."""

import os

# Before Gradio is imported anywhere: no look-ups of hosts outside, the page works offline.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
