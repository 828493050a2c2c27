"""The bar that is always in sight: model, state, memory and queue of the engine.

The device's memory is a strip of whose it is; opened, by mouse or keyboard, it is a list of them.

Its figures are fetched by the page's script as plain JSON from /api/status every two seconds: a
timer of Gradio's costs the server ten times as much, for every open page. Its one
sentence comes in English; ui/sentences.py has it in others.
"""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from backend.services import Services
from ui.i18n import label, locale_of, t
from ui.model_panel import ModelPanel
from ui.roles import caller

# The script fills the empty elements; see assets/ui/page.js.
TEMPLATE = """
<header class="lmd-bar">
  <span class="lmd-brand"><span class="lmd-logo">&nbsp;</span>LMDesk</span>
  <span class="lmd-model" data-status="model"></span>
  <span class="lmd-state" data-status="state" data-state="unknown" role="status"></span>
  <span class="lmd-paused" data-status="paused" role="status"></span>
  <span class="lmd-detail" data-status="detail"></span>
  <span class="lmd-gauges">
    <span class="lmd-gauge" data-status="queue"></span>
    <span class="lmd-gauge" data-status="kv"></span>
    <details class="lmd-memory-of" hidden>
      <summary class="lmd-gauge">
        <span data-status="memory"></span><span class="lmd-parts" role="img"></span>
      </summary>
      <ul></ul>
    </details>
  </span>
  <select class="lmd-language"></select>
</header>
"""

# Plain links and forms: they end at the guard, before any event of Gradio's.
ME = """
<span class="lmd-me">
  <a href="./login" title="{rename}">{name}</a>
  <form method="post" action="./logout"><button>{logout}</button></form>
</span>
"""


class StatusBar:
    """The bar; with an engine of our own, the button of the models' panel, which opens below it; in
    a class, who one is.

    Attributes:
        for_hosts: parts that students do not see.
    """

    def __init__(self, services: Services) -> None:
        self.for_hosts: list[Any] = []
        with gr.Row(elem_id="status-row"):
            gr.HTML(TEMPLATE, elem_id="status-bar", padding=False, apply_default_css=False)
            in_class = services.classroom.has_hosts
            self.me = gr.HTML(
                elem_id="me", padding=False, apply_default_css=False) if in_class else None
            if services.engines and services.library:
                button = gr.Button(label("models.open_panel"), elem_id="models-button", size="sm")
                self.for_hosts.append(button)
        if services.engines and services.library:
            ModelPanel(services).opened_by(button)

    def wire_load(self, page: gr.Blocks) -> None:
        """Show the name."""
        if self.me:
            page.load(self.on_load, [], [self.me], show_progress="hidden",
                      api_visibility="private")

    async def on_load(self, request: gr.Request) -> str:
        name, locale = caller(request).name, locale_of(request)
        return ME.format(name=escape(name), rename=escape(t("class.rename", locale)),
                         logout=escape(t("class.log_out", locale)))
