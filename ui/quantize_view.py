"""What a quantization will take, as HTML. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from backend.hub.fetch import gigabytes
from ui.i18n import t
from ui.job_view import clock


def planning_html(locale: str) -> str:
    """While it is being looked at."""
    return f'<p class="lmd-quiet lmd-busy">{escape(t("quantize.planning", locale))}</p>'


def plan_html(plan: Mapping[str, Any], seconds_before: float | None, locale: str) -> str:
    """Memory, disk, time and target.

    Args:
        plan: fields of quantize/preflight.py's Plan.
        seconds_before: that the same job took the last time.
    """
    free = gigabytes(plan["memory_free"])
    device = t("quantize.plan.device", locale, device=plan["device"], dtype=plan["dtype"])
    memory = t("quantize.plan.free", locale, free=free)
    if plan["memory"]:
        memory = t("quantize.plan.memory_of", locale, needed=gigabytes(plan["memory"]), free=free)
    rows = [("quantize.plan.on", device), ("quantize.plan.memory", memory)]
    if plan["target"] is None:
        rows.append(("quantize.plan.target", t("quantize.plan.nothing", locale)))
    else:
        rows += [
            ("quantize.plan.disk", t("quantize.plan.disk_of", locale, disk=gigabytes(plan["disk"]),
                                     source=gigabytes(plan["source"]),
                                     free=gigabytes(plan["disk_free"]))),
            ("quantize.plan.target", plan["target"]),
        ]
    if seconds_before is not None:
        rows.append(("quantize.plan.time",
                     t("quantize.plan.time_of", locale, time=clock(seconds_before))))
    body = "".join(f"<dt>{escape(t(key, locale))}</dt><dd>{escape(words)}</dd>"
                   for key, words in rows)
    return f'<section class="lmd-takes"><dl>{body}</dl></section>'
