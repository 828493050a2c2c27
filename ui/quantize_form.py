"""What the quantize tab's form amounts to: a command line."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from backend.data_dir import data_dir, results_dir
from backend.errors import UserError
from backend.model_library import ModelLibrary
from ui.forms import whole_number
from ui.i18n import t


@dataclass(frozen=True)
class Method:
    """A way to make a model smaller.

    Attributes:
        command: of `lite`; "evaluate" makes nothing, and measures.
        suffix: of the result's folder.
        load_options: EngineConfig's, for loading the result.
    """

    command: str
    suffix: str = ""
    load_options: dict[str, Any] = field(default_factory=dict)

    @property
    def calibrates(self) -> bool:
        return bool(self.suffix)


METHODS = {
    "w4a16": Method("auto_awq", "awq"),
    "kv8": Method("evaluate", load_options={"quant_policy": 8}),
    "w8a8": Method("smooth_quant", "w8a8"),
    "both": Method("auto_awq", "awq", {"quant_policy": 8}),
}
DATASETS = ("bundled", "c4", "ptb", "wikitext2", "pileval")
OWN = "own"
GROUP_SIZES = ("128", "64", "32")
MAX_TEXT = 4_000_000  # characters of an own text


class QuantizeForm(NamedTuple):
    """The form's values as they come from a browser: nothing is checked yet."""

    model: Any
    method: Any
    dataset: Any
    samples: Any
    seqlen: Any
    group_size: Any
    tokens: Any
    text: Any

    @property
    def how(self) -> Method:
        """Raises UserError if it is none of METHODS."""
        return METHODS[_choice(self.method, METHODS, "method")]

    def argv(self, library: ModelLibrary, locale: str, *, write: bool = False) -> list[str]:
        """The command line, without "python app.py".

        Args:
            write: store an own text where the command finds it.

        Raises:
            UserError: a value is not allowed; `field` says which.
        """
        folder, how = library.checked(self.model), self.how
        judged = ["--eval-tokens", str(_count(self.tokens, "eval_tokens", 1 << 24, locale))]
        if how.command == "evaluate":
            return ["lite", "evaluate", str(folder), "--against", str(folder),
                    "--quant-policy", "8", *judged]
        group = ["--w-group-size", _choice(self.group_size, GROUP_SIZES, "w_group_size")]
        return [
            "lite", how.command, str(folder), "--work-dir", str(_target(folder, how.suffix)),
            *(group if how.command == "auto_awq" else []),
            "--calib-dataset", self._data(locale, write),
            "--calib-samples", str(_count(self.samples, "calib_samples", 1 << 16, locale)),
            "--calib-seqlen", str(_count(self.seqlen, "calib_seqlen", 1 << 20, locale)), *judged]

    def _data(self, locale: str, write: bool) -> str:
        if _choice(self.dataset, (*DATASETS, OWN), "calib_dataset") != OWN:
            return str(self.dataset)
        text = self.text if isinstance(self.text, str) else ""
        if not text.strip():
            raise UserError(t("quantize.no_text", locale), field="text")
        if len(text) > MAX_TEXT:
            raise UserError(t("quantize.long_text", locale, most=MAX_TEXT), field="text")
        data = text.encode("utf-8", "replace")
        name = hashlib.sha256(data).hexdigest()[:16]
        path = data_dir() / "texts" / (name + (".jsonl" if is_jsonl(text) else ".txt"))
        if write:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            draft = path.with_name(f".{name}.new")
            with open(draft, "wb", opener=_private) as file:
                file.write(data)
            draft.replace(path)
        return str(path)


def is_jsonl(text: str) -> bool:
    """Whether a text is objects with "text", one a line, by its first line; the command that reads
    it names a later line that is none."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and isinstance(value.get("text"), str)


def _private(path: str, flags: int) -> int:
    """An opener: whoever else uses this machine cannot read it."""
    return os.open(path, flags, 0o600)


def _target(folder: Path, suffix: str) -> Path:
    """A folder among the results that is not there yet."""
    first = path = results_dir() / f"{folder.name}-{suffix}"
    number = 1
    while path.exists():
        number += 1
        path = first.with_name(f"{first.name}-{number}")
    return path


def _choice(value: Any, choices: Any, name: str) -> str:
    if not isinstance(value, str) or value not in choices:
        raise UserError(t("error.not_offered", value=repr(value)[:60]), field=name)
    return value


def _count(value: Any, name: str, most: int, locale: str) -> int:
    return whole_number(value, t(f"quantize.{name}", locale), most, locale, field=name)
