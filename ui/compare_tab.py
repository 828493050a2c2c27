"""The compare tab: two models side by side; how fast a model is; how good it is.

Of its parts, `SideBySide` chats, and loads what is not served; the others start jobs, and are there
only where the page has jobs of its own.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from backend.services import Services
from ui.i18n import label
from ui.side_by_side import SideBySide

TO_COMPARE = "() => window.LMDESK.showTab('compare')"
EVENT: dict[str, Any] = {
    "show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}


class CompareTab:
    """Builds the tab's components inside the current layout and wires them."""

    def __init__(self, services: Services) -> None:
        with gr.Column(elem_classes="lmd-tab", elem_id="compare-page"):
            gr.Markdown(label("compare.intro"))
            self.sides = SideBySide(services)

    def wire_load(self, page: gr.Blocks) -> None:
        """What happens when the page is opened, and closed."""
        self.sides.wire_load(page)

    def wire_select(self, tab: gr.Tab) -> None:
        """List the models when the tab is opened."""
        targets = [picker.target for picker in self.sides.pickers]
        tab.select(self.sides.on_choices, targets, targets, **EVENT)
