"""Conversations and text to rows of tokens with a mask of what is learnt."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from assets.demo_model.train.conversation import END_OF_TEXT, IM_END, IM_START, Conversation

CONTEXT = 2048
ROW = CONTEXT + 1  # inputs are row[:-1], targets row[1:]
OPEN_ROWS = 24
CORRUPTED = 0.12  # share of text tokens

Piece = tuple[NDArray[np.int16], NDArray[np.bool_]]  # token ids, learnt or not: same length


def encode_conversations(
    tokenizer: Tokenizer, conversations: Sequence[Conversation]
) -> Iterator[Piece]:
    """Token ids with ``<|endoftext|>`` at the end; learnt are the assistant's words and ends."""
    start, end = tokenizer.token_to_id(IM_START), tokenizer.token_to_id(IM_END)
    heading = len(tokenizer.encode("assistant\n").ids)
    texts = [c.text() + END_OF_TEXT for c in conversations]
    for conversation, encoding in zip(conversations, tokenizer.encode_batch(texts), strict=True):
        ids = np.array(encoding.ids, dtype=np.int16)
        learnt = np.zeros(len(ids), dtype=np.bool_)
        starts, ends = np.flatnonzero(ids == start), np.flatnonzero(ids == end)
        for message, first, last in zip(conversation.messages, starts, ends, strict=True):
            if message.role == "assistant":
                learnt[first + 1 + heading : last + 1] = True
        yield ids, learnt


def text_pieces(
    documents: Sequence[NDArray[np.int16]], rng: random.Random, vocab_size: int
) -> Iterator[Piece]:
    """Endless random spans of the documents, longer documents more often.

    The text is short and seen many times: one token in ``1 / CORRUPTED`` is replaced by another
    one and not learnt, so that the network cannot just learn the text by heart.
    """
    weights = list(itertools.accumulate(len(d) for d in documents))
    noise = np.random.default_rng(rng.getrandbits(64))
    while True:
        document = rng.choices(documents, cum_weights=weights)[0]
        length = rng.choice((256, 512, 1024))
        first = rng.randrange(max(1, len(document) - length // 2))
        span = document[first : first + length].copy()
        corrupted = noise.random(len(span)) < CORRUPTED
        span[corrupted] = noise.integers(3, vocab_size, corrupted.sum())
        yield span, ~corrupted


def pack(pieces: Iterable[Piece], pad: int) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
    """Rows of ``ROW`` tokens, each starting with a whole piece: first fit among a few open rows.

    Returns tokens [rows, ROW] and learnt [rows, ROW]; padding is never learnt. Pieces longer than
    a row are an error: the corpus keeps within the context.
    """
    rows: list[list[Piece]] = []
    open_rows: list[tuple[list[Piece], int]] = []  # pieces, room left
    for piece in pieces:
        size = len(piece[0])
        if size > ROW:
            raise ValueError(f"a piece of {size} tokens does not fit a row of {ROW}")
        for index, (row, room) in enumerate(open_rows):
            if size <= room:
                row.append(piece)
                open_rows[index] = (row, room - size)
                break
        else:
            if len(open_rows) == OPEN_ROWS:
                fullest = min(range(OPEN_ROWS), key=lambda i: open_rows[i][1])
                rows.append(open_rows.pop(fullest)[0])
            open_rows.append(([piece], ROW - size))
    rows.extend(row for row, _ in open_rows)
    tokens = np.full((len(rows), ROW), pad, dtype=np.int16)
    learnt = np.zeros((len(rows), ROW), dtype=np.bool_)
    for index, row in enumerate(rows):
        ids = np.concatenate([ids for ids, _ in row])
        tokens[index, : len(ids)] = ids
        learnt[index, : len(ids)] = np.concatenate([mask for _, mask in row])
    return tokens, learnt
