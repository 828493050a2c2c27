"""Mixed lengths of prompts and replies: a committed list like chats that people share.

Without their data set, lognormals stand for it: inputs of median 120 and sigma 1.5, outputs of
median 110 and sigma 1.3, then rescaled to the published means of 226 and 200 tokens. That the
lengths are lognormal is an assumption.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

from backend.errors import UserError

PATH = Path(__file__).resolve().parents[2] / "assets" / "benchmark" / "mixed_lengths.json"
COUNT, SEED = 1000, 0
INPUT_MEDIAN, INPUT_SIGMA, INPUT_MEAN = 120, 1.5, 226
OUTPUT_MEDIAN, OUTPUT_SIGMA, OUTPUT_MEAN = 110, 1.3, 200
# Outside these, the benchmarks with the data set drop a conversation.
MIN_TOKENS, MAX_PROMPT, MAX_TOTAL = 4, 1024, 2048

Pair = tuple[int, int]


def is_kept(prompt: int, output: int) -> bool:
    """Whether a conversation of these lengths takes part."""
    return (
        min(prompt, output) >= MIN_TOKENS and prompt <= MAX_PROMPT and prompt + output <= MAX_TOTAL
    )


def generate_lengths() -> list[Pair]:
    """The committed list, made anew: COUNT pairs of (prompt, output) tokens."""
    rng = random.Random(SEED)
    drawn: list[tuple[float, float]] = []
    while len(drawn) < COUNT:
        prompt = rng.lognormvariate(math.log(INPUT_MEDIAN), INPUT_SIGMA)
        output = rng.lognormvariate(math.log(OUTPUT_MEDIAN), OUTPUT_SIGMA)
        if is_kept(round(prompt), round(output)):
            drawn.append((prompt, output))
    prompts = _with_mean(
        INPUT_MEAN,
        lambda factor: [_clamp(prompt * factor, MAX_PROMPT) for prompt, _ in drawn],
    )
    outputs = _with_mean(
        OUTPUT_MEAN,
        lambda factor: [
            _clamp(output * factor, MAX_TOTAL - tokens)
            for (_, output), tokens in zip(drawn, prompts)
        ],
    )
    return list(zip(prompts, outputs))


def _clamp(tokens: float, high: int) -> int:
    return max(MIN_TOKENS, min(high, round(tokens)))


def _with_mean(mean: float, scaled: Callable[[float], list[int]]) -> list[int]:
    """`scaled` by the factor that gives this mean; bounds make it other than the plain ratio."""
    low, high = 0.1, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(scaled(middle)) / COUNT < mean:
            low = middle
        else:
            high = middle
    return scaled(high)


def read_lengths(count: int) -> list[Pair]:
    """The first `count` pairs of the committed list, from its beginning again where it ends."""
    with open(PATH, encoding="utf-8") as file:
        pairs = json.load(file)["pairs"]
    return [tuple(pairs[index % len(pairs)]) for index in range(count)]


def write_lengths() -> None:
    """Write the committed file."""
    about = "Tokens of (prompt, output); made by backend/benchmark/lengths.py, which explains them."
    lines = ",\n".join(json.dumps(pair) for pair in generate_lengths())
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(f'{{"about": {json.dumps(about)}, "pairs": [\n{lines}\n]}}\n', encoding="utf-8")


def read_conversations(
    path: str, encode: Callable[[str, bool], list[int]], count: int, seed: int
) -> list[tuple[str, list[int], int]]:
    """Prompts from a ShareGPT file, in random order.

    Args:
        path: a JSON list of {"conversations": [{"value": text}, ...]}; the first turn is the
            prompt, the length of the second that of the reply.
        encode: text and whether to begin it as a text -> token ids.
        count: prompts wanted.
        seed: of the order.

    Returns:
        (text, its token ids, tokens of the reply) of each.

    Raises:
        UserError: it cannot be read, is something else, or has too few conversations that fit.
    """
    try:
        with open(path, encoding="utf-8") as file:
            entries = json.load(file)
        turns = [
            (entry["conversations"][0]["value"], entry["conversations"][1]["value"])
            for entry in entries
            if len(entry.get("conversations") or []) >= 2
        ]
    except OSError as error:
        raise UserError(
            f"The data set {path} cannot be read: {error.strerror}.", "Check the path."
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _no_conversations(path) from error
    if not all(isinstance(text, str) for turn in turns for text in turn):
        raise _no_conversations(path)
    random.Random(seed).shuffle(turns)
    found: list[tuple[str, list[int], int]] = []
    for prompt, reply in turns:
        ids, output = encode(prompt, True), len(encode(reply, False))
        if is_kept(len(ids), output):
            found.append((prompt, ids, output))
            if len(found) == count:
                return found
    raise UserError(
        f"The data set {path} has {len(found)} conversations of fitting lengths, not {count}.",
        f"Ask for fewer: --num-prompts {len(found)}." if found else "Take another file.",
    )


def _no_conversations(path: str) -> UserError:
    return UserError(
        f"The data set {path} is not a list of conversations.",
        'It must be JSON like [{"conversations": [{"value": "..."}, {"value": "..."}]}].',
    )


def random_words(count: int, rng: random.Random) -> str:
    """A text of so many short English words, of about a token each."""
    words = ("the time of a new day is in our old house and it was not so far from here "
                  "where they all go out to see how well one can do when no one will help").split()
    return " ".join(rng.choice(words) for _ in range(count))


if __name__ == "__main__":
    write_lengths()
