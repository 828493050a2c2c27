"""What a chat is asked with: system prompt, sampling, and presets of both."""

from __future__ import annotations

from typing import Any

import gradio as gr

from backend.config import SamplingParams
from backend.history import History
from backend.services import Services
from ui import forms
from ui.conversations import Conversation
from ui.i18n import label
from ui.presets import PresetPicker


class ChatSettings:
    """Builds the fields inside the current layout."""

    def __init__(self, services: Services, history: History) -> None:
        self.services = services
        self.presets = PresetPicker(history)
        self.system_prompt = gr.Textbox(
            elem_id="system-prompt",
            label=label("chat.system_prompt"),
            placeholder=label("chat.system_prompt_placeholder"),
            lines=3,
            max_lines=10,
        )
        with gr.Accordion(label("chat.sampling"), open=True):
            main = forms.sampling_inputs(forms.MAIN_FIELDS, self.defaults)
        with gr.Accordion(label("chat.more_sampling"), open=False):
            more = forms.sampling_inputs(forms.MORE_FIELDS, self.defaults)
        self.sampling = dict(zip(forms.SAMPLING_FIELDS, [*main, *more], strict=True))
        self.fields = (self.system_prompt, *self.sampling.values())

    @property
    def defaults(self) -> dict[str, Any]:
        """What the form starts with, by the model that is served now."""
        return forms.defaults(self.services.sampling_defaults)

    def values(self, form: dict[Any, Any]) -> dict[str, Any]:
        """The sampling fields as they were typed."""
        return {name: form[field] for name, field in self.sampling.items()}

    def params(self, form: dict[Any, Any]) -> SamplingParams:
        """The same, checked.

        Raises:
            UserError: naming the first setting that is out of range.
        """
        return forms.sampling_params(self.values(form))

    def shown(self, system_prompt: str, sampling: dict[str, Any]) -> dict[Any, Any]:
        """The fields with these settings, and the defaults for those that are not named."""
        values = self.defaults | {k: v for k, v in sampling.items() if k in self.sampling}
        return {self.system_prompt: system_prompt,
                **{field: values[name] for name, field in self.sampling.items()}}

    def of(self, conversation: Conversation) -> dict[Any, Any]:
        """The fields as the conversation was last asked with."""
        return self.shown(conversation.system_prompt, conversation.sampling)
