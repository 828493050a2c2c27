"""The small files of a model folder, read as data: regular files of bounded size only.

Nothing here imports more than the standard library, so that the template process stays small.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from backend.errors import UserError

MAX_BYTES = 16 << 20  # the largest tokenizer_config.json in use has about 1 MB
AGAIN = "Download the model again."
SENTENCEPIECE_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def read_text(path: Path) -> str | None:
    """Text of a UTF-8 file; None if there is no such file.

    Raises:
        UserError: not a regular file, too large, unreadable, or not UTF-8.
    """
    try:
        if not path.exists():
            return None
        if not path.is_file():  # a named pipe would block for ever
            raise UserError(f"{path} is not a regular file.", AGAIN)
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is larger than {MAX_BYTES >> 20} MiB.", AGAIN)
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text.", AGAIN) from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file.

    Raises:
        UserError: see `read_text`; or not a JSON object.
    """
    text = read_text(path)
    if text is None:
        return {}
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not valid JSON.", AGAIN) from None
    if not isinstance(data, dict):
        raise UserError(f"{path} does not hold a JSON object.", AGAIN)
    return data


def special_tokens(folder: Path) -> dict[str, str]:
    """Named tokens ("bos_token": "<s>", ...) of tokenizer_config.json and its older companion.

    Beside a tokenizer.model alone, what they leave out is SentencePiece's own, as in transformers.
    """
    found: dict[str, str] = {}
    if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
        found |= SENTENCEPIECE_TOKENS
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for name, value in read_json(folder / file).items():
            if isinstance(value, dict):  # an AddedToken, written out
                value = value.get("content")
            if name.endswith("_token") and isinstance(value, str):
                found[name] = value
            elif value is None:
                found.pop(name, None)
    return found


def chat_template_source(folder: Path) -> str | None:
    """The Jinja source of the model's chat template; None if it has none.

    Looks where transformers does: chat_template.jinja, then chat_template.json, then
    tokenizer_config.json, where a list of templates has one named "default".
    """
    source: Any = read_text(folder / "chat_template.jinja")
    for file in ("chat_template.json", "tokenizer_config.json"):
        if source is None:
            source = read_json(folder / file).get("chat_template")
    if isinstance(source, list):
        named = [t for t in source if isinstance(t, dict) and t.get("name") == "default"]
        source = named[0].get("template") if named else None
    if source is not None and not isinstance(source, str):
        raise UserError(f"The chat template in {folder} is not text.", AGAIN)
    return source
