"""From a dataclass of settings to form fields and back: label, help and bounds stand once."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from typing import Any

import gradio as gr

from backend.config import SamplingParams, base_type
from backend.errors import UserError
from backend.workspace.keys import ENGINE_KEYS, KEYS, SWITCH, Key
from ui.i18n import label, t

MAIN_FIELDS = ("temperature", "top_p", "max_tokens")
MORE_FIELDS = (
    "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
)
SAMPLING_FIELDS = MAIN_FIELDS + MORE_FIELDS
PAGE_DEFAULTS = {"max_tokens": 512}  # the tutorials' 512; the API's own default is all that fits


def help_key(name: str) -> str:
    """The i18n key of a setting's help; its English text is the dataclass's metadata."""
    return f"help.{name}"


def setting_help_key(key: Key) -> str:
    """The i18n key of the help of a key of a model's settings."""
    return f"help.{'ini' if KEYS.get(key.name) is key else 'engine'}.{key.name}"


def help_texts() -> dict[str, str]:
    """i18n key -> English help of every setting that a form shows."""
    settings = (*KEYS.values(), *ENGINE_KEYS.values())
    return {help_key(f.name): _sentence(f) for f in _sampling_fields()} | {
        setting_help_key(key): key.help for key in settings
    }


def defaults(recommended: Mapping[str, Any]) -> dict[str, Any]:
    """What the sampling form starts with; `recommended` by the checkpoint comes first."""
    known = PAGE_DEFAULTS | dict(recommended)
    return {f.name: known.get(f.name, f.default) for f in _sampling_fields()}


def sampling_inputs(
    names: Sequence[str], values: Mapping[str, Any], prefix: str = "sampling"
) -> list[gr.Number]:
    """Number fields for settings of `SamplingParams`, inside the current layout block.

    They have no minimum or maximum of Gradio's: it would answer a value out of range with a
    sentence of its own or move it silently; `SamplingParams` says it better.

    Args:
        prefix: of their ids, which are once on a page.
    """
    by_name = {f.name: f for f in _sampling_fields()}
    return [_number(by_name[name], values[name], f"{prefix}-{name}") for name in names]


def sampling_params(values: Mapping[str, Any]) -> SamplingParams:
    """`SamplingParams` from the form's values.

    Raises:
        UserError: naming the first setting that is empty and may not be, or is out of range.
    """
    hints = typing.get_type_hints(SamplingParams)
    for name, value in values.items():
        if value is None and not base_type(hints[name])[1]:
            raise UserError(t("error.empty_number", name=name), field=name)
    return SamplingParams(**values)


def _sampling_fields() -> list[Field[Any]]:
    return [f for f in fields(SamplingParams) if f.name in SAMPLING_FIELDS]


def _sentence(f: Field[Any]) -> str:
    low, high = f.metadata["low"], f.metadata["high"]
    text = f.metadata["help"]
    if low is not None and high is not None and high <= 100:
        text += f" ({low:g} to {high:g})"
    return text


def _number(f: Field[Any], value: float | None, elem_id: str) -> gr.Number:
    kind, _ = base_type(typing.get_type_hints(SamplingParams)[f.name])
    return gr.Number(
        value=value,
        label=f.name,  # the field's own term, as in the API and in error messages
        info=label(help_key(f.name)),
        step=1 if kind is int else 0.05,
        elem_id=elem_id,
        min_width=120,
    )


def whole_number(value: Any, words: str, most: int, locale: str, *, field: str) -> int:
    """A whole number from 1 to `most` that somebody typed into the field of that name.

    Raises:
        UserError: it is none.
    """
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0
    if not whole or not 1 <= value <= most:
        raise UserError(t("error.whole_number", locale, name=words, most=most), field=field)
    return int(value)


def setting_input(key: Key, elem_id: str) -> Any:
    """An input for a key of a model's settings, without a value yet. What is locked is greyed.

    Bounds are not Gradio's, as for sampling settings.
    """
    common: dict[str, Any] = {"label": key.name, "elem_id": elem_id, "min_width": 150}
    if key.locked:
        return gr.Textbox(interactive=False, elem_classes="lmd-locked", **common)
    if key.is_switch:
        return gr.Checkbox(interactive=True, **common)
    if key.choices:
        return gr.Dropdown(list(key.choices), interactive=True, filterable=False, **common)
    if key.type is str:
        return gr.Textbox(interactive=True, max_lines=1, **common)
    return gr.Number(interactive=True, step=1 if key.type is int else 0.05, **common)


def setting_value(key: Key, text: str | None) -> Any:
    """What such an input shows for the `text` in a file; None: it is not there, and an input for
    numbers then shows nothing, others the default."""
    if text is None:
        shows_default = key.type is bool or key.choices
        return (bool(key.default) if key.is_switch else key.default) if shows_default else None
    value = key.parse(text)
    if key.locked:
        return text
    return bool(value) if key.choices == SWITCH else value


def pressed(event: gr.EventData) -> str:
    """The elem_id of the button whose event it is, of several that share a handler; "" of none.

    Gradio hands over a copy of a component that it has once updated, so which object it is tells
    nothing.
    """
    return getattr(event.target, "elem_id", None) or ""
