"""From a dataclass of settings to form fields and back: label, help and bounds stand once."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from typing import Any

import gradio as gr

from backend.config import SamplingParams, base_type
from ui.i18n import label

MAIN_FIELDS = ("temperature", "top_p", "max_tokens")
MORE_FIELDS = (
    "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
)
SAMPLING_FIELDS = MAIN_FIELDS + MORE_FIELDS
PAGE_DEFAULTS = {"max_tokens": 512}  # the tutorials' 512; the API's own default is all that fits


def help_key(name: str) -> str:
    """The i18n key of a setting's help; its English text is the dataclass's metadata."""
    return f"help.{name}"


def help_texts() -> dict[str, str]:
    """i18n key -> English help of every setting that a form shows."""
    return {help_key(f.name): _sentence(f) for f in _sampling_fields()}


def defaults(recommended: Mapping[str, Any]) -> dict[str, Any]:
    """What the sampling form starts with; `recommended` by the checkpoint comes first."""
    known = PAGE_DEFAULTS | dict(recommended)
    return {f.name: known.get(f.name, f.default) for f in _sampling_fields()}


def sampling_inputs(names: Sequence[str], values: Mapping[str, Any]) -> list[gr.Number]:
    """Number fields for settings of `SamplingParams`, inside the current layout block.

    They have no minimum or maximum of Gradio's: it would answer a value out of range with a
    sentence of its own or move it silently; `SamplingParams` says it better.
    """
    by_name = {f.name: f for f in _sampling_fields()}
    return [_number(by_name[name], values[name]) for name in names]


def sampling_params(values: Mapping[str, Any]) -> SamplingParams:
    """`SamplingParams` from the form's values.

    Raises:
        UserError: naming the first setting that is out of range.
    """
    return SamplingParams(**values)


def _sampling_fields() -> list[Field[Any]]:
    return [f for f in fields(SamplingParams) if f.name in SAMPLING_FIELDS]


def _sentence(f: Field[Any]) -> str:
    low, high = f.metadata["low"], f.metadata["high"]
    text = f.metadata["help"]
    if low is not None and high is not None and high <= 100:
        text += f" ({low:g} to {high:g})"
    return text


def _number(f: Field[Any], value: float | None) -> gr.Number:
    kind, _ = base_type(typing.get_type_hints(SamplingParams)[f.name])
    return gr.Number(
        value=value,
        label=f.name,  # the field's own term, as in the API and in error messages
        info=label(help_key(f.name)),
        step=1 if kind is int else 0.05,
        elem_id=f"sampling-{f.name}",
        min_width=120,
    )
