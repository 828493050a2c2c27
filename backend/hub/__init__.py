"""Models from Hugging Face, its mirrors and ModelScope: planned, fetched, verified, published.

    hub = Hub("huggingface")
    plan = make_plan(hub, "Qwen/Qwen2.5-0.5B-Instruct")     # files, bytes, disk
    folder = fetch(hub, plan, report=print)                 # goes on where the last run ended

`find` and `downloads` say what is there. Everything blocks: run it in a thread or a process.
"""

from backend.hub.errors import HubError
from backend.hub.fetch import Progress, fetch, gigabytes
from backend.hub.library import Download, discard, downloads, find, models_dir, target_of
from backend.hub.plan import Hub, Plan, PlannedFile, make_plan
from backend.hub.sources import ENDPOINTS, is_id

__all__ = [
    "ENDPOINTS", "Download", "Hub", "HubError", "Plan", "PlannedFile", "Progress", "discard",
    "downloads", "fetch", "find", "gigabytes", "is_id", "make_plan", "models_dir", "target_of",
]
