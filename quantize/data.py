"""Token windows to calibrate on: bundled text, a user's own, or a public data set.

The data sets that the tutorials name lie on a hub that many machines cannot reach. Then the
bundled text is used, which needs no network, and the note says so.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backend.errors import UserError
from backend.tokenizer import Tokenizer

BUNDLED = "bundled"
BUNDLED_FOLDER = Path(__file__).resolve().parents[1] / "assets" / "calibration"
HELDOUT = "heldout_"  # files so called are for evaluation; in a folder they are passed over
BUNDLED_NAME = "the bundled English and Chinese text"
# Languages take turns, so that a long text does not drown a short one.
BUNDLED_LANGUAGES = ("en*.txt", "zh_*.txt")
# Name -> (arguments of datasets.load_dataset, column that holds the text, what parts two rows:
# rows of ptb and wikitext2 are lines of a text).
DATASETS: dict[str, tuple[dict[str, Any], str, str]] = {
    "c4": (
        dict(
            path="allenai/c4",
            data_files={"train": "en/c4-train.00000-of-01024.json.gz"},
            split="train",
        ),
        "text",
        "\n\n",
    ),
    "ptb": (
        dict(path="ptb-text-only/ptb_text_only", name="penn_treebank", split="train"),
        "sentence",
        "\n",
    ),
    "wikitext2": (
        dict(path="Salesforce/wikitext", name="wikitext-2-raw-v1", split="train"),
        "text",
        "",
    ),
    "pileval": (dict(path="mit-han-lab/pile-val-backup", split="validation"), "text", "\n\n"),
}
DOCUMENT_BREAK = re.compile(r"\n\n\n+|\n---\n")  # see assets/calibration/README.md
PIECE_CHARS = 1 << 16  # longer documents are cut, so that no more is tokenized than is wanted
MAX_TEXT_BYTES = 256 << 20  # of a user's own files
CHARS_PER_TOKEN = 8  # more than any language needs on average, so what is fetched suffices
VARIETY = 4  # windows are drawn from a text this many times as long as all of them, if there is one
HUB_TIMEOUT_S = 10.0

Fetch = Callable[[str, int], str]


@dataclass(frozen=True)
class Samples:
    """What to calibrate on.

    Attributes:
        ids: int64 [samples, seqlen], on the CPU.
        source: what it was taken from, to be recorded: "bundled", a data set's name or a path.
        note: one or two sentences on that for the user, with what went otherwise than asked.
    """

    ids: Tensor
    source: str
    note: str


class DatasetUnavailable(Exception):
    """A public data set cannot be had here; the text says why."""


def load_samples(
    dataset: str,
    tokenizer: Tokenizer,
    samples: int,
    seqlen: int,
    *,
    seed: int = 0,
    strict: bool = False,
    fetch: Fetch | None = None,
) -> Samples:
    """Random windows of text, the same for the same seed.

    Each begins with the token that begins a text, where the model has one, as when served.

    Args:
        dataset: "bundled", one of DATASETS, or the path of a .txt file, a .jsonl file (objects
            with "text", one a line) or a folder of them.
        samples: windows.
        seqlen: tokens of each.
        strict: refuse if a named data set cannot be had, instead of taking the bundled text.
        fetch: gets (name, how many characters suffice) and returns a data set's text;
            by default from the hub.

    Raises:
        UserError: no such data, nothing to read in it, or too little for one window.
        UserError: `strict`, and the data set cannot be had.
    """
    if samples < 1 or seqlen < 2:
        raise UserError(
            f"{samples} samples of {seqlen} tokens are nothing to calibrate on.",
            "Use --calib-samples of 1 and --calib-seqlen of 2 or more.",
        )
    note = ""
    texts: list[list[str]] = []  # documents by language
    if dataset in DATASETS:
        try:
            texts = [[(fetch or fetch_dataset)(dataset, samples * seqlen * CHARS_PER_TOKEN)]]
            note = f"Calibrated on {dataset}."
        except DatasetUnavailable as error:
            if strict:
                raise UserError(
                    f"The data set {dataset} cannot be had here: {error}.",
                    "Without --strict-dataset the bundled text is used; or name a file of yours.",
                    field="calib_dataset",
                ) from error
            note = f"{dataset} cannot be had here: {error}. Calibrated on {BUNDLED_NAME} instead."
            dataset = BUNDLED
    elif dataset != BUNDLED:
        documents, cut = read_documents(Path(dataset))
        note = f"Calibrated on {dataset}."
        if cut:
            note += f" Only its first {MAX_TEXT_BYTES >> 20} MiB were read."
        texts = [documents]
    if dataset == BUNDLED:
        texts = [
            [text for path in sorted(BUNDLED_FOLDER.glob(pattern)) for text in _documents(path)]
            for pattern in BUNDLED_LANGUAGES
        ]
        note = note or f"Calibrated on {BUNDLED_NAME}."
    ids = _windows(texts, tokenizer, samples, seqlen, seed, dataset)
    return Samples(ids, dataset, note)


def read_documents(path: Path) -> tuple[list[str], bool]:
    """Documents of a .txt or .jsonl file, or of all of these in a folder.

    Returns:
        (documents, whether text was left unread because there is too much).

    Raises:
        UserError: nothing there, not readable, not UTF-8, or a line that is no such object.
    """
    if path.is_dir():
        files = sorted(
            file for file in path.rglob("*")
            if file.is_file() and file.suffix in (".txt", ".jsonl")
            and not file.name.startswith(HELDOUT)
        )
        if not files:
            raise UserError(f"{path} holds no .txt or .jsonl file.", field="calib_dataset")
    elif path.is_file():
        if path.suffix not in (".txt", ".jsonl"):
            raise UserError(
                f"{path} is neither a .txt nor a .jsonl file.",
                "Save the text as UTF-8 in a .txt file.", field="calib_dataset",
            )
        files = [path]
    else:
        raise UserError(
            f"There is no calibration data {str(path)!r:.200}.",
            f"Name a file or a folder, or one of {BUNDLED}, {', '.join(DATASETS)}.",
            field="calib_dataset",
        )
    documents: list[str] = []
    size = 0
    for file in files:
        for text in _documents(file):
            documents.append(text)
            size += len(text.encode("utf-8", "replace"))
            if size >= MAX_TEXT_BYTES:
                return documents, True
    if not documents:
        raise UserError(f"{path} holds no text.", field="calib_dataset")
    return documents, False


def _documents(file: Path) -> Iterator[str]:
    """The texts of one file that are not blank."""
    try:
        with open(file, encoding="utf-8-sig") as lines:
            if file.suffix == ".jsonl":
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        text = _text_of(line, f"{file}, line {number},").strip()
                        if text:
                            yield text
            else:
                for part in DOCUMENT_BREAK.split(lines.read(MAX_TEXT_BYTES)):
                    if part.strip():
                        yield part.strip()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text.", "Save it as UTF-8.") from None


def _text_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise UserError(
            f"{where} is no JSON object with a string \"text\".",
            "A .jsonl file has one such object a line.", field="calib_dataset",
        )
    return str(value["text"])


def _windows(
    texts: list[list[str]], tokenizer: Tokenizer, samples: int, seqlen: int, seed: int, name: str
) -> Tensor:
    """int64 [samples, seqlen], of each language's text in turn."""
    rng = random.Random(seed)
    bos = _beginning(tokenizer)
    length = seqlen - len(bos)
    wanted = max(samples * length * VARIETY // len(texts), length)
    streams = [_stream(documents, tokenizer, wanted, rng) for documents in texts]
    longest = max(len(stream) for stream in streams)
    streams = [stream for stream in streams if len(stream) >= length]
    if not streams:
        raise UserError(
            f"{name} has {longest} tokens, too few for one sample of {seqlen}.",
            "Use a smaller --calib-seqlen, or more text.", field="calib_dataset",
        )
    windows = []
    for index in range(samples):
        stream = streams[index % len(streams)]
        start = rng.randrange(len(stream) - length + 1)
        windows.append(bos + stream[start : start + length])
    return torch.tensor(windows, dtype=torch.int64)


def _beginning(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before every text: the one token that begins it, or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer.encode("a")[:1] == [bos] else []


def _stream(
    documents: list[str], tokenizer: Tokenizer, wanted: int, rng: random.Random
) -> list[int]:
    """Tokens of documents in random order, one after another, until there are enough."""
    between = tokenizer.encode("\n\n", add_special_tokens=False)
    pieces = [
        text[start : start + PIECE_CHARS]
        for text in documents
        for start in range(0, len(text), PIECE_CHARS)
    ]
    rng.shuffle(pieces)
    stream: list[int] = []
    for piece in pieces:
        if len(stream) >= wanted:
            break
        stream += tokenizer.encode(piece, add_special_tokens=False) + between
    return stream


def fetch_dataset(name: str, characters: int) -> str:
    """The beginning of one of DATASETS, by the optional package `datasets`.

    Streamed: a training split has gigabytes. HF_ENDPOINT may name a mirror.

    Raises:
        DatasetUnavailable: the package or the hub is not there.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise DatasetUnavailable("the Python package datasets is not installed") from None
    offline = any(
        os.environ.get(key, "").upper() in ("1", "TRUE", "YES", "ON")
        for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    )
    if not offline:  # then the package's own cache is asked
        _check_reachable(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    arguments, column, between = DATASETS[name]
    rows: list[str] = []
    size = 0
    try:
        for row in datasets.load_dataset(**arguments, streaming=not offline):
            rows.append(row[column])
            size += len(row[column])
            if size >= characters:
                break
    except Exception as error:  # the package raises whatever its file systems do
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DatasetUnavailable(f"{reason:.200}".rstrip(".")) from error
    return between.join(rows)


def _check_reachable(endpoint: str) -> None:
    """Ask once, with a limit: the package itself would try for minutes."""
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # it answered
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise DatasetUnavailable(f"{endpoint} does not answer ({reason})") from None
