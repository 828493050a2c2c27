"""Where tests of the Triton kernels run: on the GPU if there is one, else interpreted on the CPU.

Import this before anything that imports triton.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def hasten_interpreter() -> None:
    """Spare Triton's interpreter a third of its time, which it spends on work that is done already.

    With each call of one jit function by another it patches triton.language again, as the launch
    has; that looks through some thousand attributes. Here a launch patches each module once. And
    NumPy's type for one of Triton's is looked up in a table made anew every time.
    """
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    language = (interpreter.tl, interpreter.tl.core)
    patched: set[tuple[bool, ...]] = set()

    def patch_once(fn: Any) -> Any:
        seen = fn.__globals__.values()
        modules = tuple(any(value is module for value in seen) for module in language)
        if modules in patched:
            return interpreter._LangPatchScope()  # nothing to restore
        patched.add(modules)
        return patch(fn)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()  # the last launch has taken its patches back
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew
    np_dtype = interpreter._get_np_dtype
    of_scalar = functools.cache(np_dtype)

    def np_dtype_of(kind: Any) -> Any:
        kind = kind.scalar if kind.is_block() else kind
        return np_dtype(kind) if kind.is_ptr() else of_scalar(kind)

    interpreter._get_np_dtype = np_dtype_of


if not ON_GPU:
    hasten_interpreter()
