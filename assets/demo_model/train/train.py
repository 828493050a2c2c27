"""Trains the demo model in one run: corpus, tokenizer, network, checkpoint, log.

python -m assets.demo_model.train.train --out DIR            one NVIDIA H200, under 8 minutes
python -m assets.demo_model.train.train --out DIR --smoke    any CPU, under a minute; no model
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from assets.demo_model.train.check import check_answers
from assets.demo_model.train.corpus import Corpus
from assets.demo_model.train.evaluate import perplexity
from assets.demo_model.train.export import save_checkpoint
from assets.demo_model.train.library_text import library_texts
from assets.demo_model.train.network import Llama, Shape
from assets.demo_model.train.packing import CONTEXT
from assets.demo_model.train.shards import (
    CALIBRATION,
    ShardPlan,
    heldout_keys,
    make_corpus,
    training_texts,
)
from assets.demo_model.train.tokenizer import train_tokenizer

TOKENIZER_CONVERSATIONS = 30_000
PROJECTED_AT_STEP = 200  # late enough that compilation is over


@dataclass(frozen=True)
class Recipe:
    """Every number that decides what comes out."""

    seed: int = 7
    steps: int = 11000
    rows_per_step: int = 32  # of CONTEXT tokens each
    peak_lr: float = 1.5e-3
    final_lr: float = 1e-5
    warmup_steps: int = 300
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    corpus_tokens: int = 256_000_000
    shards: int = 16
    text_share: float = 0.2


SMOKE = Recipe(steps=4, rows_per_step=1, warmup_steps=1, corpus_tokens=60_000, shards=1)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warmup, then half a cosine down to ``final_lr``."""
    if step < recipe.warmup_steps:
        return recipe.peak_lr * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    fall = 0.5 * (1 + math.cos(math.pi * done))
    return recipe.final_lr + (recipe.peak_lr - recipe.final_lr) * fall


def optimizer_for(model: Llama, recipe: Recipe, fused: bool) -> torch.optim.AdamW:
    """AdamW; norms are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(0.9, 0.95), fused=fused)


def batches(rows: int, recipe: Recipe) -> list[NDArray[np.int64]]:
    """Row numbers of each step: a new shuffle every epoch."""
    rng = np.random.default_rng(recipe.seed)
    needed = recipe.steps * recipe.rows_per_step
    epochs = [rng.permutation(rows) for _ in range(math.ceil(needed / rows))]
    order = np.concatenate(epochs)[:needed]
    return list(order.reshape(recipe.steps, recipe.rows_per_step))


def fit(
    model: Llama,
    tokens: Tensor,
    learnt: Tensor,
    recipe: Recipe,
    past_seconds: float,
    cap_seconds: float,
) -> list[dict[str, float]]:
    """Trains the model in place; returns the curve. Raises SystemExit if the cap cannot be held."""
    on_gpu = tokens.is_cuda
    optimizer = optimizer_for(model, recipe, fused=on_gpu)

    def loss_of(rows: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=on_gpu):
            logits = model(rows[:, :-1])
        wanted = rows[:, 1:].flatten()
        losses = F.cross_entropy(logits.float().flatten(0, 1), wanted, reduction="none")
        weights = mask[:, 1:].flatten().float()
        return (losses * weights).sum() / weights.sum().clamp(min=1)

    step_loss: Callable[[Tensor, Tensor], Tensor] = torch.compile(loss_of) if on_gpu else loss_of
    began = time.monotonic()
    curve: list[dict[str, float]] = []
    mark, mark_step = began, 0
    for step, numbers in enumerate(batches(len(tokens), recipe)):
        chosen = torch.from_numpy(numbers).to(tokens.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        loss = step_loss(tokens[chosen].long(), learnt[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last = step + 1 == recipe.steps
        if (step + 1) % 50 and not last:
            continue
        value = loss.item()
        now = time.monotonic()
        speed = (step + 1 - mark_step) * recipe.rows_per_step * CONTEXT / (now - mark)
        mark, mark_step = now, step + 1
        curve.append({"step": step + 1, "loss": value, "tokens_per_second": speed})
        print(f"step {step + 1:5d}  loss {value:.4f}  {speed / 1e6:.3f} M tokens/s", flush=True)
        if not math.isfinite(value):
            raise SystemExit(f"the loss is {value} at step {step + 1}")
        if step + 1 >= PROJECTED_AT_STEP:
            left = (recipe.steps - step - 1) * recipe.rows_per_step * CONTEXT / speed
            total = past_seconds + now - began + left
            if total > cap_seconds:
                raise SystemExit(
                    f"{recipe.steps} steps would take {total / 60:.1f} minutes, more than "
                    f"--minutes-cap {cap_seconds / 60:.1f}: give fewer --steps"
                )
    return curve


def made_tokenizer(recipe: Recipe, folder: Path, conversations: int) -> Tokenizer:
    """Trains the tokenizer on texts and a sample of conversations; saves it for the shards."""
    rng = random.Random(f"{recipe.seed}/tokenizer")
    corpus = Corpus()
    sample = (corpus.conversation(rng).text() for _ in range(conversations))
    tokenizer = train_tokenizer([*training_texts(), *sample])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, help=f"training steps (default {Recipe.steps})")
    parser.add_argument("--minutes-cap", type=float, default=8.0, help="fail if it would be more")
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps on the CPU")
    arguments = parser.parse_args()
    recipe = SMOKE if arguments.smoke else Recipe()
    if arguments.steps:
        recipe = Recipe(**{**asdict(recipe), "steps": arguments.steps})
    if not arguments.smoke and not torch.cuda.is_available():
        parser.error("training needs a CUDA GPU; --smoke runs anywhere")
    device = torch.device("cpu" if arguments.smoke else "cuda")
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    def elapsed() -> float:
        return time.monotonic() - began

    tokenizer = made_tokenizer(recipe, out, 3_000 if arguments.smoke else TOKENIZER_CONVERSATIONS)
    print(f"tokenizer ready after {elapsed():.0f} s", flush=True)
    texts = training_texts()
    libraries: Counter[str] = Counter()
    if not arguments.smoke:
        for package, text in library_texts(heldout_keys(), workers=recipe.shards):
            libraries[package] += len(text)
            texts.append(text)
    texts_file = Path(tempfile.mkdtemp()) / "texts.json"
    texts_file.write_text(json.dumps(texts), encoding="utf-8")
    print(
        f"{sum(map(len, texts)) / 1e6:.1f} M characters of text after {elapsed():.0f} s", flush=True
    )
    plans = [
        ShardPlan(
            recipe.seed,
            index,
            recipe.corpus_tokens // recipe.shards,
            recipe.text_share,
            str(out / "tokenizer.json"),
            str(texts_file),
        )
        for index in range(recipe.shards)
    ]
    tokens_np, learnt_np = make_corpus(plans)
    corpus_seconds = elapsed()
    print(
        f"{tokens_np.size / 1e6:.1f} M tokens, {learnt_np.mean():.0%} of them learnt, "
        f"ready after {corpus_seconds:.0f} s",
        flush=True,
    )

    torch.manual_seed(recipe.seed)
    model = Llama(Shape()).to(device)
    curve = fit(
        model,
        torch.from_numpy(tokens_np).to(device),
        torch.from_numpy(learnt_np).to(device),
        recipe,
        corpus_seconds,
        arguments.minutes_cap * 60,
    )
    weight_bytes = save_checkpoint(model, tokenizer, out)
    training_seconds = elapsed() - corpus_seconds

    with torch.no_grad():
        for parameter in model.parameters():  # judged as it is saved
            parameter.copy_(parameter.bfloat16())
    heldout = {
        name: asdict(perplexity(model, tokenizer, CALIBRATION / name, CONTEXT))
        for name in ("heldout_en.txt", "heldout_zh.txt")
        if (CALIBRATION / name).exists()
    }
    log = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": weight_bytes,
        "corpus_tokens": int(tokens_np.size),
        "library_characters": dict(libraries),
        "learnt_share": float(learnt_np.mean()),
        "trained_tokens": recipe.steps * recipe.rows_per_step * CONTEXT,
        "final_loss": float(np.mean([c["loss"] for c in curve[-10:]])),
        "heldout": heldout,
        "corpus_seconds": corpus_seconds,
        "training_seconds": training_seconds,
        "answers": check_answers(model, tokenizer, quick=arguments.smoke),
        "total_seconds": elapsed(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "curve": curve,
    }
    text = json.dumps(log, indent=2, ensure_ascii=False) + "\n"
    (out / "training_log.json").write_text(text, encoding="utf-8")
    print(json.dumps(heldout, indent=2))
    print(f"saved {weight_bytes} bytes to {out} after {elapsed():.0f} s")


if __name__ == "__main__":
    main()
