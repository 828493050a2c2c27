"""The walk through the ways to serve a model: 16 bits, int8 KV cache, 4-bit weights, both.

What `guide measure` finds out is a file a step, so that any tab, and `guide show`, tells the same.
Here is what a step is, what its file holds, and what follows of all of them; measuring is
`quantize.guide`'s.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from backend.data_dir import data_dir
from backend.errors import UserError
from backend.model_files import read_json

QUESTIONS = (
    "What is the KV cache?",
    "When should I set quant_policy?",
    "12 + 30 = ?",
    "Write a short story about a fox.",
    "什么是 W4A16？",
)
SHARE = 0.8  # of the memory that weights leave, for the KV cache; as cache_max_entry_count
JUDGED = "judged.json"


@dataclass(frozen=True)
class Step:
    """One way to serve a model.

    Attributes:
        weights: the weights are quantized to 4 bits.
        kv: the KV cache is kept in int8.
    """

    id: str
    weights: bool
    kv: bool


STEPS = {
    step.id: step
    for step in (
        Step("fp16", False, False), Step("kv8", False, True), Step("w4", True, False),
        Step("both", True, True),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """What was measured of one step; the file STEP.json.

    Attributes:
        served: folder of the model that was measured.
        dtype: computed in.
        weight_bytes: as loaded by the engine.
        kv_bytes_per_token, kv_bits: of the KV cache.
        total_bytes: the device's memory.
        ttft_s: time to first token, median over the questions, one at a time.
        tokens_per_s: of one reply, after its first token; median.
        perplexity, nats: over held-out text.
        loss: nats a token more than the first step's; None for that one itself.
        passed, sentence: the verdict on that.
        replies: to QUESTIONS, greedy.
        options: flags that it is served with.
        created: seconds since the epoch.
        seconds: that measuring took.
    """

    step: str
    served: str
    device: str
    dtype: str
    quantization: str
    weight_bytes: int
    disk_bytes: int
    kv_bytes_per_token: int
    kv_bits: int
    total_bytes: int
    ttft_s: float
    tokens_per_s: float
    nats: float
    perplexity: float
    loss: float | None
    passed: bool
    sentence: str
    text: str
    replies: tuple[str, ...]
    options: tuple[str, ...]
    created: float
    seconds: float

    @property
    def tokens_fit(self) -> int:
        """Tokens that the KV cache holds in SHARE of what the weights leave of the device."""
        left = max(self.total_bytes - self.weight_bytes, 0)
        return int(left * SHARE) // self.kv_bytes_per_token

    @property
    def serve_command(self) -> str:
        """What serves the model this way."""
        return shlex.join(["python", "app.py", "serve", "api_server", self.served, *self.options])


class Walk:
    """What is known of a model's walk.

    Args:
        model: folder of the 16-bit model.
        root: where walks are kept; None is the user's data directory.

    Raises:
        UserError: the user has no home directory.
    """

    def __init__(self, model: str | os.PathLike[str], root: Path | None = None) -> None:
        self.model = os.path.realpath(os.path.expanduser(model))
        mark = hashlib.sha256(os.fsencode(self.model)).hexdigest()[:12]
        name = os.path.basename(self.model)
        self.folder = (root or data_dir() / "guide") / f"{name}-{mark}"

    def figures(self) -> dict[str, Figures]:
        """Of the steps that were measured, in the walk's order."""
        return {step: found for step in STEPS if (found := self._read(step)) is not None}

    def _read(self, step: str) -> Figures | None:
        try:
            raw = read_json(self.folder / f"{step}.json")
            known = {f.name: raw[f.name] for f in fields(Figures)}
            known |= {name: tuple(known[name]) for name in ("replies", "options")}
            found = Figures(**known)
            return found if found.step == step and found.kv_bytes_per_token > 0 else None
        except (UserError, KeyError, TypeError):  # not measured, or by another version
            return None

    def write(self, figures: Figures) -> Path:
        """Keep what was measured. Raises UserError if it cannot be written."""
        return self._write(f"{figures.step}.json", asdict(figures))

    def judged(self) -> dict[str, bool]:
        """What its user said of steps: good enough, or not."""
        try:
            raw = read_json(self.folder / JUDGED)
        except UserError:
            return {}
        return {step: raw[step] for step in STEPS if isinstance(raw.get(step), bool)}

    def judge(self, step: str, good: bool) -> None:
        """Keep what the user says of a step. Raises UserError if it cannot be written."""
        if step not in STEPS or not isinstance(good, bool):
            raise UserError(f"There is no step {step!r:.40}.", f"Steps: {', '.join(STEPS)}.")
        self._write(JUDGED, {**self.judged(), step: good})

    def _write(self, name: str, content: Mapping[str, Any]) -> Path:
        path = self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f".{name}.{os.getpid()}")
            draft.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
            os.replace(draft, path)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}.") from error
        return path

    def recommended(self) -> Figures | None:
        """The last step that is good enough: by its user's word, else by its verdict; None if
        none is, or nothing was measured."""
        judged = self.judged()
        good = [f for step, f in self.figures().items() if judged.get(step, f.passed)]
        return good[-1] if good else None


def table(found: Sequence[Figures]) -> str:
    """`guide show`, for a terminal."""
    rows = [
        ("", *(f.step for f in found)),
        ("weights", *(f"{f.weight_bytes / 1e9:.3f} GB" for f in found)),
        ("KV cache a token", *(f"{f.kv_bytes_per_token:,} bytes" for f in found)),
        ("tokens that fit", *(f"{f.tokens_fit:,}" for f in found)),
        ("first token", *(f"{f.ttft_s * 1e3:.0f} ms" for f in found)),
        ("tokens/s", *(f"{f.tokens_per_s:.1f}" for f in found)),
        ("perplexity", *(f"{f.perplexity:.3f}" for f in found)),
        ("loss, nats", *("" if f.loss is None else f"{f.loss:+.4f}" for f in found)),
        ("verdict", *("passed" if f.passed else "failed" for f in found)),
    ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))])
        for line in rows
    )


def measure_command(model: str, step: str) -> list[str]:
    """The words after `python app.py` that measure a step."""
    return ["guide", "measure", model, "--step", step]
