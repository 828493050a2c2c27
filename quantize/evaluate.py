"""Runs a model over held-out text, alone or against another; verdict.py says what it means.

Two models are never in memory at once: of each one the final hidden states of all tokens are kept
on the host, with its output head, and the logits are made of them a few rows at a time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from backend.errors import UserError
from backend.models.checkpoint import read_checkpoint
from backend.models.model_config import ModelConfig
from backend.models.registry import read_model_config
from backend.tokenizer import Tokenizer
from quantize.model_run import PROMPTS, KVFormat, ModelRun, Window, run_model
from quantize.progress import Progress
from quantize.verdict import THRESHOLD, Comparison, Measured, Verdict, bootstrap, judge

HELDOUT = Path(__file__).resolve().parents[1] / "assets" / "calibration"
# File -> what parts its documents (assets/calibration/README.md).
HELDOUT_FILES = {"heldout_en.txt": "\n\n\n", "heldout_zh.txt": "\n---\n"}
HELDOUT_NAME = "bundled held-out text, English and Chinese"
LOGITS = 1 << 24  # logits compared at a time: about 0.5 GB with all that is derived of them


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured.

    Attributes:
        tokens: of the held-out text at most, spread over its documents.
        seqlen: longest context in tokens.
        threshold: nats a token that a model may lose against the other one.
        dtype: activations' (and unquantized weights'); auto is float32 on a CPU, where rounding
            then hides nothing, and on a GPU the original's 16-bit format.
    """

    tokens: int = 32768
    seqlen: int = 512
    threshold: float = THRESHOLD
    device: str = "auto"
    dtype: str = "auto"


def evaluate(
    model: str,
    against: str | None = None,
    settings: EvaluationSettings | None = None,
    progress: Progress | None = None,
    kv: KVFormat | None = None,
) -> Verdict:
    """Measure the model in folder `model`, and with `against` compare it with that one.

    Args:
        kv: of `model`; the other one's is in 16 bits (or float32).

    Raises:
        UserError: a folder cannot be loaded, or the two models do not share a vocabulary.
    """
    settings = settings or EvaluationSettings()
    progress = progress or Progress()
    device = pick_device(settings.device)
    config = read_model_config(model)
    tokenizer = Tokenizer.from_folder(model)
    if against is not None:
        _check_same_vocabulary(model, config, tokenizer, against)
    dtype = pick_dtype(settings.dtype, device, against or model)
    windows = heldout_windows(
        tokenizer, settings.tokens, min(settings.seqlen, config.max_position_embeddings)
    )
    folders = [folder for folder in (against, model) if folder is not None]
    formats = [KVFormat(), kv or KVFormat()][-len(folders) :]
    runs = [
        run_model(folder, windows, device, dtype, progress, form)
        for folder, form in zip(folders, formats)
    ]
    sums = compare(runs, windows, config.vocab_size, device, progress)
    tokens = int(sums.counts.sum())
    measured = [
        Measured(
            os.path.abspath(folder) + form.label, float(nats.sum()) / tokens, disk_bytes(folder),
            run.memory_bytes, str(dtype).removeprefix("torch."), run.replies, run.seconds,
        )
        for folder, form, run, nats in zip(folders, formats, runs, sums.nats)
    ]
    comparison = None
    if against is not None:
        losses = sums.nats[1] - sums.nats[0]
        comparison = Comparison(
            float(losses.sum()) / tokens,
            *bootstrap(losses, sums.counts),
            sums.divergence / tokens,
            sums.agreed / tokens,
        )
    return judge(
        measured[-1],
        measured[0] if against is not None else None,
        comparison,
        threshold=settings.threshold,
        vocab_size=config.vocab_size,
        tokens=tokens,
        documents=len(sums.counts),
        text=f"{HELDOUT_NAME}: {tokens} tokens of {len(sums.counts)} documents",
        prompts=PROMPTS,
    )


def heldout_windows(tokenizer: Tokenizer, tokens: int, seqlen: int) -> list[Window]:
    """The bundled held-out text, one document of each language after another, in windows.

    Args:
        tokens: end when there are so many. A document gives a 32nd of them at most (64 at least),
            so that a few long ones do not speak for all.
        seqlen: longest window.
    """
    texts = [
        (HELDOUT / name).read_text(encoding="utf-8").split(mark)
        for name, mark in HELDOUT_FILES.items()
    ]
    documents = [text.strip() for row in zip_longest(*texts) for text in row if text]
    windows: list[Window] = []
    left = tokens
    for index, document in enumerate(filter(None, documents)):
        ids = tokenizer.encode(document)[: min(left, max(64, tokens // 32))]
        parts = [ids[start : start + seqlen] for start in range(0, len(ids), seqlen)]
        windows += [Window(index, part) for part in parts if len(part) >= 2]
        left -= len(ids)
        if left < 2:
            break
    return windows


def disk_bytes(folder: str) -> int:
    """Bytes of the weights' files."""
    return sum(os.path.getsize(path) for path in {t.path for t in read_checkpoint(folder).values()})


def pick_device(name: str) -> torch.device:
    """auto takes a GPU if there is one.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "There is no GPU that PyTorch can use.", "Leave --device out, or say --device cpu.",
            field="device",
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pick_dtype(name: str, device: torch.device, original: str) -> torch.dtype:
    """auto is float32 on a CPU, and on a GPU the 16-bit format of the model `original`."""
    if name == "auto":
        stored = read_model_config(original).dtype
        on_gpu = "float16" if stored == "float16" else "bfloat16"
        name = "float32" if device.type == "cpu" else on_gpu
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _check_same_vocabulary(
    model: str, config: ModelConfig, tokenizer: Tokenizer, against: str
) -> None:
    other = read_model_config(against)
    text = "".join(PROMPTS)
    same = config.vocab_size == other.vocab_size
    if not same or tokenizer.encode(text) != Tokenizer.from_folder(against).encode(text):
        raise UserError(
            f"{model} and {against} do not share a vocabulary, so their tokens cannot be compared.",
            "Name the model that it was quantized from.",
            field="against",
        )


@dataclass(frozen=True)
class Sums:
    """Over all tokens, or one a document (in the order of their numbers) where it says so."""

    counts: Tensor  # float64 [documents]
    nats: list[Tensor]  # float64 [documents], one a model
    divergence: float  # KL(first || second)
    agreed: int


def compare(
    runs: Sequence[ModelRun],
    windows: Sequence[Window],
    vocab_size: int,
    device: torch.device,
    progress: Progress,
) -> Sums:
    """Logits of every place, a few rows at a time, and what is to be known of them.

    Args:
        runs: of one model or two over `windows`; divergence and agreement are of two.
    """
    documents = sorted({window.document for window in windows})
    place = {document: index for index, document in enumerate(documents)}
    counts = torch.zeros(len(documents), dtype=torch.float64)
    nats = [torch.zeros_like(counts) for _ in runs]
    divergence, agreed = 0.0, 0
    progress.stage("compare", len(windows))
    with torch.inference_mode():
        for index, window in enumerate(windows):
            at = place[window.document]
            targets = torch.tensor(window.ids[1:], device=device)
            counts[at] += len(targets)
            rows = max(1, LOGITS // vocab_size)
            for start in range(0, len(targets), rows):
                chunk = slice(start, start + rows)
                logs = [
                    run.head(run.hidden[index][chunk].to(device)).log_softmax(-1) for run in runs
                ]
                for total, log in zip(nats, logs):
                    picked = log.gather(1, targets[chunk, None])
                    total[at] -= float(picked.double().sum())
                if len(logs) == 2:
                    first, second = logs
                    kl = (first.exp() * (first - second)).sum(-1)
                    divergence += float(kl.double().sum())
                    agreed += int((first.argmax(-1) == second.argmax(-1)).sum())
            progress.step()
    return Sums(counts, nats, divergence, agreed)
