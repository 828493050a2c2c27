"""System prompt and sampling settings under a name: a few of ours, and the owner's own."""

from __future__ import annotations

import asyncio
from typing import Any

import gradio as gr

from backend.errors import UserError
from backend.history import MAX_PRESET_NAME, History, Preset
from ui.i18n import label, t

# Name, as the key of its words and of its system prompt -> what differs from the form's defaults.
BUNDLED: dict[str, dict[str, Any]] = {
    "balanced": {},
    "precise": {"temperature": 0.2, "top_p": 0.9},
    "creative": {"temperature": 1.0, "top_p": 0.95, "presence_penalty": 0.3},
    "translator": {"temperature": 0.2, "top_p": 0.9},
    "teacher": {"temperature": 0.6},
}
WITH_PROMPT = ("translator", "teacher")
OWN = "own:"  # before the name of a preset of the owner's


class PresetPicker:
    """A list to choose from, in which a new name can be typed, and what to do with it."""

    def __init__(self, history: History) -> None:
        self.history = history
        with gr.Column(elem_id="presets"):
            self.choice = gr.Dropdown(
                [], value=None, label=label("preset.title"), elem_id="preset",
                allow_custom_value=True, info=label("preset.info"))
            with gr.Row(elem_id="preset-row"):
                self.save = gr.Button(label("preset.save"), elem_id="preset-save", size="sm")
                self.delete = gr.Button(label("preset.delete"), elem_id="preset-delete", size="sm")

    async def updates(self, owner: str, locale: str, value: str | None = None) -> dict[Any, Any]:
        """The list in the reader's language, with `value` chosen."""
        own = await asyncio.to_thread(self.history.presets, owner)
        choices = [(t(f"preset.name.{name}", locale), name) for name in BUNDLED]
        choices += [(preset.name, OWN + preset.name) for preset in own]
        return {self.choice: gr.update(choices=choices, value=value)}

    async def find(
        self, owner: str, locale: str, choice: str | None
    ) -> Preset | None:
        """The chosen preset; None if it is a name that is being typed."""
        if choice in BUNDLED:
            prompt = t(f"preset.prompt.{choice}", locale) if choice in WITH_PROMPT else ""
            return Preset(choice, prompt, BUNDLED[choice])
        own = await asyncio.to_thread(self.history.presets, owner)
        return next((preset for preset in own if choice == OWN + preset.name), None)

    async def save_as(
        self, owner: str, locale: str, choice: str | None, prompt: str, sampling: dict[str, Any]
    ) -> str:
        """Save the settings under the typed or chosen name; returns the choice for the list.

        Raises:
            UserError: there is no name, it is one of ours, or there are too many.
        """
        name = (choice or "").removeprefix(OWN).strip()[:MAX_PRESET_NAME]
        ours = {*BUNDLED, *(t(f"preset.name.{bundled}", locale) for bundled in BUNDLED)}
        if not name or name in ours:
            raise UserError(t("error.preset_name", locale), field="preset")
        if not await asyncio.to_thread(self.history.save_preset, owner, name, prompt, sampling):
            raise UserError(t("error.preset_count", locale), field="preset")
        return OWN + name

    async def remove(self, owner: str, locale: str, choice: str | None) -> None:
        """Delete one of the owner's.

        Raises:
            UserError: it is not one.
        """
        if not (choice or "").startswith(OWN):
            raise UserError(t("error.preset_not_own", locale), field="preset")
        name = (choice or "").removeprefix(OWN)
        await asyncio.to_thread(self.history.delete_preset, owner, name)
