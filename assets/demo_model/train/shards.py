"""The corpus as packed token rows, made by several processes from one seed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from assets.calibration.build import key
from assets.demo_model.train.conversation import END_OF_TEXT
from assets.demo_model.train.corpus import Corpus
from assets.demo_model.train.packing import ROW, Piece, encode_conversations, pack, text_pieces

CALIBRATION = Path(__file__).parents[2] / "calibration"
BATCH = 512  # conversations encoded at once


@dataclass(frozen=True)
class ShardPlan:
    """What one shard holds. Its content depends on these fields and the files only."""

    seed: int
    index: int
    tokens: int
    text_share: float
    tokenizer_file: str
    texts_file: str  # a JSON list of documents


def training_texts() -> list[str]:
    """The documents of the calibration files; the held-out files are never among them."""
    files = sorted(p for p in CALIBRATION.glob("*.txt") if not p.name.startswith("heldout"))
    documents: list[str] = []
    for file in files:
        # English documents are parted by two blank lines, Chinese ones by a rule.
        documents.extend(re.split(r"\n\n\n|\n---\n", file.read_text(encoding="utf-8")))
    return [d.strip() for d in documents if d.strip()]


def heldout_keys() -> set[str]:
    """What no training text may repeat: the paragraphs of the held-out files."""
    texts = [p.read_text(encoding="utf-8") for p in CALIBRATION.glob("heldout*.txt")]
    return {key(block) for text in texts for block in re.split(r"\n\s*\n", text)}


def make_shard(plan: ShardPlan) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
    """Generates, encodes and packs one shard: tokens and learnt, each [rows, ROW]."""
    tokenizer = Tokenizer.from_file(plan.tokenizer_file)
    rng = random.Random(f"{plan.seed}/{plan.index}")
    corpus = Corpus()
    texts = json.loads(Path(plan.texts_file).read_text(encoding="utf-8"))
    documents = [
        np.array(e.ids, dtype=np.int16)
        for e in tokenizer.encode_batch([t + END_OF_TEXT for t in texts])
    ]
    texts = text_pieces(documents, rng, tokenizer.get_vocab_size())

    def pieces() -> Iterator[Piece]:
        talk = text = 0
        while talk + text < plan.tokens:
            batch = [corpus.conversation(rng) for _ in range(BATCH)]
            for piece in encode_conversations(tokenizer, batch):
                # A conversation longer than the context is cut by nobody: it is left out.
                if len(piece[0]) <= ROW:
                    talk += len(piece[0])
                    yield piece
                while text < plan.text_share * (talk + text):
                    span = next(texts)
                    text += len(span[0])
                    yield span

    return pack(pieces(), tokenizer.token_to_id(END_OF_TEXT))


def make_corpus(plans: list[ShardPlan]) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
    """All shards, made by as many processes as there are CPUs, in the order of the plans."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    workers = min(len(plans), len(os.sched_getaffinity(0)))
    if workers == 1:
        parts = [make_shard(plan) for plan in plans]
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            parts = list(pool.map(make_shard, plans))
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
