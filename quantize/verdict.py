"""What a quantized model is worth, by measurement: figures, and one sentence in plain words."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from backend.job_events import finite
from quantize.progress import duration
from quantize.stages import PeakMemory

THRESHOLD = 0.05  # nats a token; beyond it a model is worse in a way that its users notice
RESAMPLES = 2000  # of the bootstrap: the interval's ends then vary by some hundredths of its width
VERDICT_FILE = "verdict.json"


@dataclass(frozen=True)
class Measured:
    """One model over the held-out text.

    Attributes:
        nats: mean negative log-likelihood of a token.
        disk_bytes: of the weights' files.
        memory_bytes: of the weights as they were loaded here, in `dtype`. Where a device has no
            product for quantized weights, these are as large as the original's.
        replies: greedy continuations of the fixed prompts.
        seconds: for loading it and running all of it.
    """

    model: str
    nats: float
    disk_bytes: int
    memory_bytes: int
    dtype: str
    replies: tuple[str, ...]
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp(nats): how many tokens the model hesitates between, so to speak."""
        return math.exp(self.nats) if self.nats < 700 else math.inf  # NaN is not below 700


@dataclass(frozen=True)
class Comparison:
    """One model against another over the same tokens.

    Attributes:
        loss: nats a token by which the model is worse; below 0 it is better.
        low, high: 95 % interval of `loss`, by paired bootstrap over documents.
        mean_kl: KL(original || model) of the next token's distribution, in nats.
        top1_agreement: share of places where both think the same token likeliest.
    """

    loss: float
    low: float
    high: float
    mean_kl: float
    top1_agreement: float


@dataclass(frozen=True)
class Verdict:
    """All that was measured. `comparison` and `against` are None for a model judged alone.

    Attributes:
        text: which text it was measured on.
        notes: of the job that made the model, such as which text it was calibrated on.
        job_seconds: that quantizing it took, this time (a job that goes on has a part behind it).
        stages: seconds of the job's parts, this time, the verdict among them.
        peak_memory: the most that the job and its verdict held.
    """

    passed: bool
    sentence: str
    threshold: float
    tokens: int
    documents: int
    text: str
    prompts: tuple[str, ...]
    model: Measured
    against: Measured | None = None
    comparison: Comparison | None = None
    notes: tuple[str, ...] = ()
    job_seconds: float | None = None
    stages: dict[str, float] | None = None
    peak_memory: PeakMemory | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: NaN and infinity, which it does not have, are None."""
        values = asdict(self)
        for name, measured in (("model", self.model), ("against", self.against)):
            if measured is not None:
                values[name]["perplexity"] = measured.perplexity
        return finite(values)

    def write(self, folder: str) -> None:
        """verdict.json in `folder`, whole or not at all."""
        path = os.path.join(folder, VERDICT_FILE)
        with open(path + ".partial", "w", encoding="utf-8") as file:
            json.dump(self.as_dict(), file, ensure_ascii=False, indent=2)
        os.replace(path + ".partial", path)

    def table(self) -> str:
        """The same for a terminal."""
        models = [m for m in (self.against, self.model) if m is not None]
        rows = [
            ("", [os.path.basename(m.model.rstrip("/")) for m in models]),
            ("perplexity", [f"{m.perplexity:.4f}" for m in models]),
            ("nats a token", [f"{m.nats:.4f}" for m in models]),
            ("weights on disk", [size(m.disk_bytes) for m in models]),
            ("weights here", [f"{size(m.memory_bytes)} as {m.dtype}" for m in models]),
            ("measured in", [duration(m.seconds) for m in models]),
        ]
        widths = [max(len(row[1][i]) for row in rows) for i in range(len(models))]
        lines = [
            f"{name:16}" + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths))
            for name, cells in rows
        ]
        if self.comparison is not None:
            c = self.comparison
            lines += [
                f"{'loss':16}  {c.loss:+.4f} nats a token, 95 % interval {c.low:+.4f} to "
                f"{c.high:+.4f}",
                f"{'mean KL':16}  {c.mean_kl:.4f} nats",
                f"{'same top token':16}  {100 * c.top1_agreement:.2f} %",
            ]
        lines.append(f"{'text':16}  {self.text}")
        if self.job_seconds is not None:
            lines.append(f"{'quantized in':16}  {duration(self.job_seconds)}")
        for stage, seconds in (self.stages or {}).items():
            lines.append(f"  {stage:16}{seconds:9.2f} s")
        if self.peak_memory is not None:
            gpu = self.peak_memory.gpu
            on_gpu = "" if gpu is None else f"{size(gpu)} on the GPU, "
            lines.append(f"{'peak memory':16}  {on_gpu}{size(self.peak_memory.host)} on the host")
        lines += [f"{'note':16}  {note}" for note in self.notes]
        for index, prompt in enumerate(self.prompts):
            lines += ["", f"> {prompt}"]
            for m in models:
                reply = " ".join(m.replies[index].split())
                lines.append(f"  {os.path.basename(m.model.rstrip('/'))}: {reply}")
        return "\n".join([*lines, "", self.sentence])


def judge(
    model: Measured,
    against: Measured | None,
    comparison: Comparison | None,
    *,
    threshold: float,
    vocab_size: int,
    tokens: int,
    documents: int,
    text: str,
    prompts: tuple[str, ...],
) -> Verdict:
    """The verdict on what was measured. A model that is not a number anywhere has failed.

    Against another, it fails past `threshold` nats of loss. Alone, it fails only if it is no
    better than drawing from the vocabulary with equal chances, which says that it is broken.
    """
    if comparison is None or against is None:
        chance = math.log(vocab_size)
        passed = model.nats < chance
        if passed:
            sentence = (
                f"Measured: perplexity {model.perplexity:.2f}; without --against there is nothing "
                "to tell how good that is for this model."
            )
        else:
            sentence = (
                f"Failed: the model is no better than chance ({_nats(model.nats)} nats a token; "
                f"chance is {chance:.2f})."
            )
    else:
        passed = comparison.loss <= threshold and math.isfinite(comparison.mean_kl)
        how = "better" if comparison.loss < 0 else "worse"
        cost = (
            f"{_nats(abs(comparison.loss))} nats a token {how} than the original (95 % interval of "
            f"the loss {_nats(comparison.low)} to {_nats(comparison.high)}), perplexity "
            f"{against.perplexity:.2f} to {model.perplexity:.2f}, and it agrees on "
            f"{100 * comparison.top1_agreement:.1f} % of the tokens"
        )
        if passed:
            sentence = f"Passed: the model is {cost}; up to {threshold:g} nats is accepted."
        else:
            sentence = (
                f"Failed: the model is {cost}; only up to {threshold:g} nats is accepted, so do "
                "not use it."
            )
    return Verdict(
        passed, sentence, threshold, tokens, documents, text, prompts, model, against, comparison
    )


def bootstrap(losses: Tensor, counts: Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % interval of sum(losses) / sum(counts), documents drawn with replacement.

    Args:
        losses: float64 [documents], the sum over each document's tokens of (model - original).
        counts: float64 [documents], tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(losses), (RESAMPLES, len(losses)), generator=generator)
    means = losses[drawn].sum(1) / counts[drawn].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high


def size(count: int) -> str:
    """Bytes for people: 28.3 MB, 4.1 GB (powers of 1000)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def _nats(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "not a number of"
