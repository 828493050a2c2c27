"""Which form of an op is taken: the device's own, or the reference."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

# Device type -> the module with its own forms of some ops.
OWN_FORMS = {"cpu": "kernels.cpu", "cuda": "kernels.gpu"}

_reference_only: ContextVar[bool] = ContextVar("reference_only", default=False)


@contextmanager
def reference_only(on: bool = True) -> Iterator[None]:
    """What is loaded and run within, by this thread, takes the reference's forms only."""
    token = _reference_only.set(on)
    try:
        yield
    finally:
        _reference_only.reset(token)


def is_reference_only() -> bool:
    """Whether this runs within `reference_only`."""
    return _reference_only.get()


def implementation(name: str, device_type: str) -> Callable[..., Any]:
    """The function that serves op `name` on `device_type`: the device's own, else the reference."""
    return form_on(name, "" if _reference_only.get() else device_type)


@cache
def form_on(name: str, device_type: str) -> Callable[..., Any]:
    """The same whatever `reference_only` says; "" is no device."""
    if device_type in OWN_FORMS:
        found = getattr(importlib.import_module(OWN_FORMS[device_type]), name, None)
        if found is not None:
            return found
    return getattr(importlib.import_module("kernels.reference"), name)
