"""Taking a chat along: as a file, or as code that asks the same."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from ui import snippets
from ui.i18n import label

KINDS = ("curl", "python", "command_line")
FILES = {"markdown": ("md", snippets.as_markdown), "json": ("json", snippets.as_json)}


class ChatTools:
    """Buttons, and the box that shows the code. The chat tab knows what to put into it.

    Attributes:
        files, code: elem_id of a button in `export`, or in `show` -> what it makes.
    """

    def __init__(self) -> None:
        with gr.Accordion(label("chat.take_along"), open=False, elem_id="chat-tools"):
            with gr.Row(elem_classes="lmd-buttons"):
                self.files = {f"export-{kind}": kind for kind in FILES}
                self.export = [gr.Button(label(f"chat.export.{kind}"), size="sm", elem_id=elem_id)
                               for elem_id, kind in self.files.items()]
            gr.Markdown(label("chat.code_info"), elem_classes="lmd-small")
            with gr.Row(elem_classes="lmd-buttons"):
                self.code = {f"code-{kind}": kind for kind in KINDS}
                self.show = [gr.Button(label(f"chat.code.{kind}"), size="sm", elem_id=elem_id)
                             for elem_id, kind in self.code.items()]
            self.shown = gr.Code(
                visible=False, elem_id="code", interactive=False, wrap_lines=True,
                show_label=False, label=label("chat.take_along"))
        self.file = gr.Textbox(visible=False)  # on its way to the browser's downloads
        self.origin = gr.Textbox(visible=False)  # where the browser sees this server

    def wire_download(self, event: Any) -> None:
        """Hand the file that `event` puts into `self.file` to the browser."""
        event.then(None, [self.file], [], js="(file) => window.LMDESK.download(file)")

    def file_update(self, name: str, text: str) -> dict[Any, Any]:
        return {self.file: json.dumps({"name": name, "text": text})}

    def code_update(self, kind: str, text: str) -> dict[Any, Any]:
        language = "python" if kind == "python" else "shell"
        return {self.shown: gr.update(value=text, language=language, visible=True)}
