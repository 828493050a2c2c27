"""A model large enough to tell methods of quantization apart, trained where it is measured.

A Llama of 55 million parameters, with a KV head for each query head, so that V smooths the output
projection, is trained for some minutes on what the bundled model was trained on. It is not shipped.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor

from assets.demo_model.train.corpus import Corpus
from assets.demo_model.train.export import config as config_json
from assets.demo_model.train.library_text import library_texts
from assets.demo_model.train.network import Llama, Shape
from assets.demo_model.train.packing import CONTEXT
from assets.demo_model.train.shards import ShardPlan, heldout_keys, make_corpus, training_texts
from assets.demo_model.train.train import Recipe, fit
from backend.models.checkpoint import read_checkpoint

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo_model"
COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
HELDOUT_DOCUMENTS = 250  # of the packages' documents; the model sees none of them
OUTLIERS = 4  # channels of each norm and MLP
OUTLIER_FACTORS = (20.0, 50.0)
# What may be multiplied in a decoder layer, and the matrices that then read it divided.
OUTLIER_PAIRS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)


@dataclass(frozen=True)
class Plan:
    """What is trained, and on how much."""

    shape: Shape
    recipe: Recipe
    documents: int | None = None  # of the packages' documents; None: all
    heldout: int = HELDOUT_DOCUMENTS


FULL = Plan(
    Shape(
        hidden_size=640, intermediate_size=1792, num_hidden_layers=10, num_attention_heads=10,
        num_key_value_heads=10,
    ),
    Recipe(
        steps=3000, rows_per_step=16, peak_lr=1.2e-3, warmup_steps=150, corpus_tokens=64_000_000,
        shards=14, text_share=0.8,
    ),
)  # fmt: skip
TINY = Plan(
    Shape(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    ),
    Recipe(steps=20, rows_per_step=1, warmup_steps=2, corpus_tokens=60_000, shards=1),
    documents=40, heldout=8,
)  # fmt: skip


def train_model(
    folder: Path, plan: Plan, device: torch.device
) -> tuple[list[str], dict[str, Any]]:
    """Train a model and write it as a float16 checkpoint.

    Returns:
        (documents that it has not seen, figures of the training).
    """
    began = time.monotonic()
    libraries = library_texts(heldout_keys(), workers=plan.recipe.shards)
    documents = [text for _, text in islice(libraries, plan.documents)]
    libraries.close()  # and with it its processes
    every = max(len(documents) // plan.heldout, 2)
    heldout = documents[::every]
    kept = [text for index, text in enumerate(documents) if index % every]
    with tempfile.TemporaryDirectory() as scratch:
        texts_file = Path(scratch) / "texts.json"
        texts_file.write_text(json.dumps([*training_texts(), *kept]), encoding="utf-8")
        recipe = plan.recipe
        tokens, learnt = make_corpus([
            ShardPlan(
                recipe.seed, index, recipe.corpus_tokens // recipe.shards, recipe.text_share,
                str(DEMO / "tokenizer.json"), str(texts_file),
            )
            for index in range(recipe.shards)
        ])  # fmt: skip
    corpus_seconds = time.monotonic() - began
    print(
        f"{len(kept)} documents, {len(heldout)} held out; {tokens.size / 1e6:.1f} M tokens after "
        f"{corpus_seconds:.0f} s",
        flush=True,
    )
    torch.manual_seed(recipe.seed)
    model = Llama(plan.shape).to(device)
    curve = fit(
        model, torch.from_numpy(tokens).to(device), torch.from_numpy(learnt).to(device), recipe,
        past_seconds=0, cap_seconds=float("inf"),
    )
    _save(model, folder)
    return heldout, {
        "shape": asdict(plan.shape),
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus_tokens": int(tokens.size),
        "trained_tokens": recipe.steps * recipe.rows_per_step * CONTEXT,
        "training_loss": sum(point["loss"] for point in curve[-4:]) / len(curve[-4:]),
        "tokens_per_second": curve[-1]["tokens_per_second"],
        "corpus_seconds": corpus_seconds,
        "training_seconds": time.monotonic() - began - corpus_seconds,
    }


def _save(model: Llama, folder: Path) -> None:
    folder.mkdir(parents=True)
    # Nothing on the way to a verdict is rounded more coarsely than need be.
    save_file(
        {name: tensor.half().cpu().contiguous() for name, tensor in model.state_dict().items()},
        folder / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    tokenizer = FastTokenizer.from_file(str(DEMO / "tokenizer.json"))
    fields = {**config_json(model.shape, tokenizer), "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")
    for name in COPIED:
        shutil.copyfile(DEMO / name, folder / name)


def fresh_conversations(count: int, seed: str = "never trained on") -> list[str]:
    """Conversations of the bundled model's generator by a seed that no shard has."""
    corpus, rng = Corpus(), random.Random(seed)
    return [corpus.conversation(rng).text() for _ in range(count)]


def plant_outliers(source: Path, target: Path, seed: int = 0) -> None:
    """The same function with channels 20 to 50 times as large, as large language models have.

    Their consumers' columns are as much smaller, so that only rounding can tell the difference.
    """
    tensors: dict[str, Tensor] = {}
    for path in {info.path for info in read_checkpoint(str(source)).values()}:
        tensors.update(load_file(path))
    generator = torch.Generator().manual_seed(seed)
    layers = json.loads((source / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    low, high = OUTLIER_FACTORS
    for layer in range(layers):
        for producer, consumers in OUTLIER_PAIRS:
            weight = tensors[f"model.layers.{layer}.{producer}.weight"]
            channels = torch.randperm(len(weight), generator=generator)[:OUTLIERS]
            factors = low + (high - low) * torch.rand(OUTLIERS, generator=generator)
            by = torch.ones(len(weight)).index_copy(0, channels, factors)
            along = by if weight.ndim == 1 else by[:, None]
            weight.copy_(weight.float() * along)
            for consumer in consumers:
                reader = tensors[f"model.layers.{layer}.{consumer}.weight"]
                reader.copy_(reader.float() / by)
    target.mkdir(parents=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", *COPIED):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
