"""Strict request models: every refusal is one sentence that names the field and what it must be."""

from __future__ import annotations

import difflib
import json
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from backend.errors import UserError

M = TypeVar("M", bound="Strict")

# Words for errors deep inside a field; a field's own `expects` comes first.
_KINDS = {
    "model_type": "an object", "dict_type": "an object", "string_type": "text",
    "int_type": "a whole number", "float_type": "a number", "bool_type": "true or false",
    "list_type": "a list",
}


class Strict(BaseModel):
    """Base of request bodies and their parts: no conversions, no unknown fields.

    `no_effect` names fields that clients send and that change nothing here, each with the reason;
    `neutral` those that are accepted only when null or equal to one of the values given.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    no_effect: ClassVar[dict[str, str]] = {}
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    parts: ClassVar[dict[str, type[Strict]]] = {}  # fields that hold (lists of) other models


def described(default: Any, help: str, expects: str, **bounds: Any) -> Any:
    """A field with its help and, for error sentences and the docs, what it must be."""
    return Field(default, description=help, json_schema_extra={"expects": expects}, **bounds)


def expects(model: type[Strict], name: str) -> str:
    """What the field must be, in words."""
    extra = model.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)  # every field is `described`
    return str(extra["expects"])


def show(value: Any) -> str:
    """`value` as a short piece of a sentence."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, str):
        return json.dumps(value if len(value) <= 40 else value[:40] + "...", ensure_ascii=False)
    return json.dumps(value, default=str)


def parse(model: type[M], data: dict[str, Any]) -> M:
    """`data` (values of JSON) as a `model`.

    Raises:
        UserError: with the first thing that is wrong, its place as `field`.
    """
    try:
        return model.model_validate(_settle(data, model))
    except ValidationError as error:
        raise _explain(error.errors(include_url=False)[0], model) from None


def _settle(data: dict[str, Any], model: type[Strict], place: str = "") -> dict[str, Any]:
    """Drop fields that are known but change nothing here; refuse the others that are no fields."""
    settled: dict[str, Any] = {}
    for name, value in data.items():
        part = model.parts.get(name)
        if part and isinstance(value, dict):
            settled[name] = _settle(value, part, f"{place}{name}.")
        elif part and isinstance(value, list):
            settled[name] = [
                _settle(item, part, f"{place}{name}[{i}].") if isinstance(item, dict) else item
                for i, item in enumerate(value)]
        elif name in model.model_fields:
            settled[name] = value
        elif name in model.neutral:
            allowed = model.neutral[name]
            if value is not None and not any(
                    type(value) is type(a) and value == a for a in allowed):
                raise UserError(f"{place}{name} is not supported by this server.",
                                "Leave it out.", field=place + name)
        elif name not in model.no_effect:
            near = difflib.get_close_matches(name[:100], model.model_fields, n=1)
            hint = f"Did you mean {near[0]}?" if near else "The fields are listed at /docs."
            raise UserError(f"Unknown field {show(place + name)}.", hint, field=place + name[:100])
    return settled


def _explain(error: ErrorDetails, model: type[Strict]) -> UserError:
    kind, loc, value = error["type"], error["loc"], error["input"]
    place = "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in loc).lstrip(".")
    if kind == "missing":
        return UserError(f"{place} is missing.", field=place)
    if kind == "value_error":
        return UserError(f"{place} {error['ctx']['error']}.", field=place)
    if len(loc) > 1 and loc[0] in model.parts:
        model, loc = model.parts[str(loc[0])], tuple(at for at in loc[1:] if isinstance(at, str))
        words = expects(model, str(loc[0])) if loc else _KINDS.get(kind, error["msg"])
    else:
        words, place = expects(model, str(loc[0])), str(loc[0])
        if len(loc) > 1:
            return UserError(f"{place} must be {words}; item {loc[1]} is {show(value)}.",
                             field=place)
    return UserError(f"{place} must be {words}, not {show(value)}.", field=place)
