"""The bar that is always in sight: model, state, memory and queue of the engine.

The device's memory is a strip of whose it is; opened, by mouse or keyboard, it is a list of them.

Its figures are fetched by the page's script as plain JSON from /api/status every two seconds: a
timer of Gradio's costs the server ten times as much, for every open page.
"""

from __future__ import annotations

import gradio as gr

from backend.services import Services
from ui.i18n import label
from ui.model_panel import ModelPanel

# The script fills the empty elements; see assets/ui/page.js.
TEMPLATE = """
<header class="lmd-bar">
  <span class="lmd-brand"><span class="lmd-logo">&nbsp;</span>LMDesk</span>
  <span class="lmd-model" data-status="model"></span>
  <span class="lmd-state" data-status="state" data-state="unknown" role="status"></span>
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


def build_status_bar(services: Services) -> None:
    """Add the bar to the current layout; with an engine of our own, the models' panel below it."""
    with gr.Row(elem_id="status-row"):
        gr.HTML(TEMPLATE, elem_id="status-bar", padding=False, apply_default_css=False)
        if services.engines and services.library:
            button = gr.Button(label("models.open_panel"), elem_id="models-button", size="sm")
    if services.engines and services.library:
        ModelPanel(services).opened_by(button)
