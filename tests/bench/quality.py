"""What quantization costs, method by method, on a model that is trained for it in the same run.

    python -m tests.bench.quality --json FILE      a GPU: about 8 minutes
    python -m tests.bench.quality --tiny           any CPU: the same path, no figures worth keeping
    python -m tests.bench.quality --model DIR      an existing 16-bit model instead

All methods get the same calibration windows. Judged are the bundled held-out text and documents
that the model has not seen: of the packages whose documentation it was trained on, or, of a model
that exists already, conversations of a new seed. Everything is done twice, the second time with
outlier channels planted into the model. Differences are by paired bootstrap over documents.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backend.models.registry import read_model_config
from backend.tokenizer import Tokenizer
from quantize.data import load_samples
from quantize.evaluate import (
    Sums,
    compare,
    disk_bytes,
    heldout_windows,
    pick_device,
    pick_dtype,
)
from quantize.model_run import KVFormat, ModelRun, Window, run_model
from quantize.progress import Progress
from quantize.verdict import bootstrap
from tests.bench.quality_methods import METHODS, RTN, W4, Job, Method
from tests.bench.quality_model import (
    FULL,
    HELDOUT_DOCUMENTS,
    TINY,
    fresh_conversations,
    plant_outliers,
    train_model,
)

SEQLEN = 512  # tokens of an evaluation window, as in `lite evaluate`
EVERYTHING = 1 << 24  # more tokens than there are
Difference = tuple[float, float, float]  # nats a token, and its 95 % interval
Texts = dict[str, list[Window]]


@dataclass(frozen=True)
class Row:
    """One method on one text.

    Attributes:
        loss: nats a token over the 16-bit model's.
        against: the same over each rival's, by its name.
        seconds: that the method took.
    """

    method: str
    loss: Difference
    mean_kl: float
    top1_agreement: float
    against: dict[str, Difference]
    disk_bytes: int
    seconds: float


@dataclass(frozen=True)
class Judged:
    """One model's rows on one text."""

    text: str
    documents: int
    tokens: int
    nats: float  # of the 16-bit model
    rows: list[Row]


def texts_of(
    tokenizer: Tokenizer, unseen: Sequence[str], tokens: int
) -> Texts:
    """Windows over `tokens` of the bundled held-out text, and one of each unseen document."""
    bundled = heldout_windows(tokenizer, tokens, SEQLEN)
    encoded = (tokenizer.encode(text)[:SEQLEN] for text in unseen)
    others = [Window(index, ids) for index, ids in enumerate(encoded) if len(ids) >= 2]
    return {"bundled held-out text": bundled, "other unseen documents": others}


def silent() -> Progress:
    """Nobody is to be told."""
    return Progress(stream=StringIO())


def difference(nats: Tensor, rival: Tensor, counts: Tensor) -> Difference:
    """Mean and interval of what a model loses against another, of their nats by document."""
    losses = nats - rival
    return float(losses.sum() / counts.sum()), *bootstrap(losses, counts)


def measured(
    runs: Sequence[ModelRun], texts: Texts, vocab_size: int, device: torch.device
) -> dict[str, Sums]:
    """One model or two over each text, and over all documents together."""
    sums, start = {}, 0
    for name, windows in texts.items():
        stop = start + len(windows)
        parts = [replace(run, hidden=run.hidden[start:stop]) for run in runs]
        sums[name] = compare(parts, windows, vocab_size, device, silent())
        start = stop
    each = list(sums.values())
    sums["all documents"] = Sums(
        torch.cat([part.counts for part in each]),
        [torch.cat(nats) for nats in zip(*(part.nats for part in each))],
        sum(part.divergence for part in each),
        sum(part.agreed for part in each),
    )
    return sums


def judge(job: Job, methods: Sequence[Method], texts: Texts) -> list[Judged]:
    """Quantize a model by each method, and measure each result on each text."""
    dtype = pick_dtype("auto", job.device, job.source)
    vocab_size = read_model_config(job.source).vocab_size
    windows = list(chain.from_iterable(texts.values()))

    def run(folder: str, form: KVFormat) -> ModelRun:
        return run_model(folder, windows, job.device, dtype, job.progress, form)

    original = run(job.source, KVFormat())
    alone = measured([original], texts, vocab_size, job.device)
    judged = {}
    for text, sums in alone.items():
        tokens = int(sums.counts.sum())
        mean = float(sums.nats[0].sum()) / tokens
        judged[text] = Judged(text, len(sums.counts), tokens, mean, [])
    _ = job.stats  # timed apart: LMDeploy's rule and kv_qparams share it
    nats: dict[str, dict[str, Tensor]] = {text: {} for text in judged}
    for number, method in enumerate(methods):
        began = time.monotonic()
        folder, form = method.make(job, str(job.folder / f"method-{number}"))
        seconds = time.monotonic() - began
        both = [original, run(folder, form)]
        for text, sums in measured(both, texts, vocab_size, job.device).items():
            first, second = sums.nats
            nats[text][method.name] = second
            judged[text].rows.append(Row(
                method.name,
                difference(second, first, sums.counts),
                sums.divergence / judged[text].tokens,
                sums.agreed / judged[text].tokens,
                {
                    rival: difference(second, nats[text][rival], sums.counts)
                    for rival in method.rivals if rival in nats[text]
                },
                disk_bytes(folder),
                seconds,
            ))  # fmt: skip
        print(f"{method.name}: made in {seconds:.1f} s", flush=True)
    return list(judged.values())


def table(judged: Judged) -> str:
    """For a terminal."""
    lines = [
        f"{judged.text}: {judged.tokens} tokens of {judged.documents} documents; the 16-bit model "
        f"has {judged.nats:.4f} nats a token",
        f"{'':22}{'loss':>9}  {'95 % interval':19}{'KL':>8}{'top 1':>9}{'of RTN':>8}{'MB':>7}"
        f"{'s':>7}",
    ]
    nearest = next((row.loss[0] for row in judged.rows if row.method == RTN), None)
    for row in judged.rows:
        loss, low, high = row.loss
        share = ""
        if nearest and row.method.startswith(W4):
            share = f"{100 * loss / nearest:.0f} %"
        lines.append(
            f"{row.method:22}{loss:+9.4f}  {low:+.4f} to {high:+.4f}{'':2}{row.mean_kl:8.4f}"
            f"{100 * row.top1_agreement:7.2f} %{share:>8}{row.disk_bytes / 1e6:7.1f}"
            f"{row.seconds:7.1f}"
        )
        for rival, (mean, low, high) in row.against.items():
            lines.append(f"  against {rival}: {mean:+.4f}, interval {low:+.4f} to {high:+.4f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a 16-bit model, instead of training one")
    parser.add_argument("--tiny", action="store_true", help="a few steps of a tiny model")
    parser.add_argument("--steps", type=int, help=f"of the training ({FULL.recipe.steps})")
    parser.add_argument("--calib-samples", type=int, default=128)
    parser.add_argument("--calib-seqlen", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0, help="of the calibration windows' choice")
    parser.add_argument("--eval-tokens", type=int, help="of the bundled held-out text (all)")
    parser.add_argument("--unseen", type=int, help=f"unseen documents ({HELDOUT_DOCUMENTS})")
    parser.add_argument("--only", nargs="+", default=[], help="methods named so in part")
    parser.add_argument("--no-outliers", action="store_true", help="not with planted outliers too")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="figures go there, too")
    parser.add_argument("--keep", type=Path, help="models go there, instead of being deleted")
    args = parser.parse_args()
    device = pick_device(args.device)
    if not (args.model or args.tiny) and device.type != "cuda":
        parser.error("training needs a GPU; --tiny and --model DIR run anywhere")
    began = time.monotonic()
    figures: dict[str, Any] = {
        "torch": torch.__version__,
        "calibration": [args.calib_samples, args.calib_seqlen, args.seed],
    }
    plan = TINY if args.tiny else FULL
    if args.steps:
        plan = replace(plan, recipe=replace(plan.recipe, steps=args.steps))
    with tempfile.TemporaryDirectory() as scratch:
        home = args.keep or Path(scratch)
        home.mkdir(parents=True, exist_ok=True)
        if args.model:
            source = args.model
            unseen = fresh_conversations(HELDOUT_DOCUMENTS if args.unseen is None else args.unseen)
        else:
            source = home / "model"
            documents, figures["training"] = train_model(source, plan, device)
            unseen = documents[: args.unseen]
            print(f"trained after {time.monotonic() - began:.0f} s: {_summary(figures)}")
        # Not before the training's processes were forked: it opens the GPU.
        figures["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        methods = [m for m in METHODS if not args.only or any(part in m.name for part in args.only)]
        models = {"as trained": source}
        if not args.no_outliers:
            models["with planted outliers"] = home / "outliers"
            plant_outliers(source, home / "outliers")
        tokenizer = Tokenizer.from_folder(source)
        texts = texts_of(
            tokenizer, unseen, args.eval_tokens or (2048 if args.tiny else EVERYTHING)
        )
        samples = load_samples(
            "bundled", tokenizer, args.calib_samples, args.calib_seqlen, seed=args.seed
        )
        tables = []
        for name, folder in models.items():
            with tempfile.TemporaryDirectory(dir=home) as results:
                dtype = pick_dtype("auto", device, str(folder))
                job = Job(str(folder), Path(results), samples, device, dtype, silent())
                judged = judge(job, methods, texts)
            figures[name] = [asdict(part) for part in judged]
            tables += [f"\n{name}, {table(part)}" for part in judged]
            if args.json:  # what is measured is kept, whatever comes
                args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
            print(f"{name}: judged after {time.monotonic() - began:.0f} s", flush=True)
    print("\n".join(tables))
    print(f"\n{time.monotonic() - began:.0f} s in all on {figures['device']}")


def _summary(figures: dict[str, Any]) -> str:
    trained = figures["training"]
    return (
        f"{trained['parameters'] / 1e6:.1f} M parameters, {trained['trained_tokens'] / 1e6:.0f} M "
        f"tokens at {trained['tokens_per_second'] / 1e3:.0f} k tokens/s, training loss "
        f"{trained['training_loss']:.3f}"
    )


if __name__ == "__main__":
    main()
