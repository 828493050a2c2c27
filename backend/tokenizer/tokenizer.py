"""A model's tokenizer, whatever file it comes in.

Decoding is ours: each token stands for some bytes, and a text is these bytes read as UTF-8. That
is what all families of tokenizers do (byte-level BPE, and SentencePiece with byte fallback), it
lets a stream end anywhere, and `detokenizer` and `Tokenizer.decode` agree by construction.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from os.path import commonprefix
from pathlib import Path
from typing import Any

from backend import chat_formats
from backend.config import SamplingParams
from backend.errors import UserError
from backend.model_files import chat_template_source, read_json, special_tokens
from backend.tokenizer.codec import Codec
from backend.workspace.layout import text_folder


class Tokenizer:
    """Encodes, decodes, and knows the tokens with a meaning of their own.

    Args:
        codec: reads the checkpoint's file.
        bos_token: text that the chat template may ask for; None if the model has none.
        eos_token_ids: ids that end a reply.
    """

    def __init__(
        self,
        codec: Codec,
        *,
        bos_token: str | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self._codec = codec
        self._bytes: dict[int, bytes] = {}
        self.special_ids = codec.special_ids
        self.bos_token = bos_token
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        self.vocab_size = codec.vocab_size

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a model folder in Hugging Face layout, or of a workspace.

        Raises:
            UserError: no folder, no tokenizer in it, or a broken file.
        """
        folder = text_folder(folder)
        codec = _codec(folder)
        named = special_tokens(folder)
        return cls(
            codec,
            bos_token=named.get("bos_token"),
            eos_token_ids=_eos_token_ids(folder, codec, named.get("eos_token")),
        )

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text, if the model has one."""
        return None if self.bos_token is None else self._codec.token_to_id(self.bos_token)

    @property
    def leading_spaces(self) -> int:
        """Spaces that `decode` takes off the beginning of a text."""
        return self._codec.leading_spaces

    @cached_property
    def special_token(self) -> re.Pattern[str] | None:
        """Matches, without taking it, where a special token of two characters or more begins."""
        tokens = [token for token in self._codec.special_tokens if len(token) > 1]
        return re.compile(f"(?={_any_of(tokens)})", re.S) if tokens else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `add_special_tokens` begins it as the model expects of a text.

        Raises:
            UserError: the text is not valid Unicode.
        """
        check_unicode(text, "The text")
        return self._codec.encode(text, add_special_tokens)

    def encode_parts(self, parts: Sequence[str]) -> list[int]:
        """Token ids of a text that comes in parts, so that no token reaches from one into another.

        Nothing is put before it. What two parts make together is never a special token.

        Raises:
            UserError: the text is not valid Unicode.
        """
        first, *rest = parts
        ids = self.encode(first, add_special_tokens=False) if first else []
        for part in rest:
            check_unicode(part, "The text")
            ids += self._codec.encode_rest(part)
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD. Unknown ids have no text."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        raw = b"".join(self.token_bytes(i) for i in ids if i not in skipped)
        spaces = len(raw) - len(raw.lstrip(b" "))
        return raw[min(spaces, self.leading_spaces):].decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that `token_id` stands for, in the middle of a text; none if unknown."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._codec.token_bytes(token_id)
            if 0 <= token_id < self.vocab_size:
                self._bytes[token_id] = known
        return known

    def token_to_id(self, token: str) -> int | None:
        """Id of a token by its spelling in the vocabulary."""
        return self._codec.token_to_id(token)


def check_unicode(text: str, name: str) -> None:
    """Refuse half surrogate pairs, which JSON can smuggle into a string.

    Raises:
        UserError: naming `name`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} is not valid Unicode: half a surrogate pair at character {error.start}."
        ) from None


def sampling_defaults(folder: str | Path) -> dict[str, float]:
    """The model author's advice in generation_config.json: valid fields of `SamplingParams` only.

    `"do_sample": false` is what transformers calls greedy: temperature 0.
    """
    advice = read_json(text_folder(folder) / "generation_config.json")
    defaults: dict[str, float] = {}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        value = advice.get(name)
        if value is None:
            continue
        try:
            SamplingParams(**{name: value})
        except UserError:
            continue  # advice out of bounds is no reason to refuse the model
        defaults[name] = value
    if advice.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return defaults


def _json(folder: Path) -> Codec:
    from backend.tokenizer.json_codec import JsonCodec

    return JsonCodec.from_folder(folder)


def _sentencepiece(folder: Path) -> Codec:
    from backend.tokenizer.sentencepiece_codec import SentencePieceCodec

    return SentencePieceCodec.from_folder(folder)


def _tiktoken(folder: Path) -> Codec:
    from backend.tokenizer.tiktoken_codec import TiktokenCodec

    return TiktokenCodec.from_folder(folder)


# In this order: a tokenizer.json is what a checkpoint's authors made last. Each library is
# imported for its own files only.
FILES = {"tokenizer.json": _json, "tokenizer.model": _sentencepiece, "qwen.tiktoken": _tiktoken}


def _codec(folder: Path) -> Codec:
    if folder.is_file():
        raise UserError(f"{folder} is a file, not a model.", "Name the folder that it lies in.")
    if not folder.is_dir():
        raise UserError(f"There is no model folder {folder}.", "Check the path.")
    for file, read in FILES.items():
        if (folder / file).exists():
            return read(folder)
    raise UserError(
        f"{folder} has no tokenizer: neither {', '.join(FILES)}.", "Download the whole model.")


def _eos_token_ids(folder: Path, codec: Codec, eos_token: str | None) -> list[int]:
    """Ids that end a reply, by every file that names one, in a fixed order."""
    ids: list[Any] = []
    for file in ("generation_config.json", "config.json"):
        value = read_json(folder / file).get("eos_token_id")
        ids += value if isinstance(value, list) else [value]
    if eos_token is not None:
        ids.append(codec.token_to_id(eos_token))
    ids += [codec.special_tokens.get(token) for token in _end_of_turn(folder)]
    return [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0]


def _end_of_turn(folder: Path) -> Sequence[str]:
    """Tokens that end a turn by the checkpoint's template; without one, by its family's."""
    source = chat_template_source(folder)
    if source is not None:
        return chat_formats.end_of_turn(source)
    declared = chat_formats.declared(folder)
    return () if declared is None else declared.stop_words


def _any_of(words: Collection[str]) -> str:
    """A regular expression for any of `words`: a branch for each beginning, not for each word,
    so that text which is like hundreds of them does not cost hundreds of comparisons."""
    if "" in words:
        return ""  # a word ends here; that a longer one goes on makes no difference
    branches: dict[str, list[str]] = {}
    for word in words:
        branches.setdefault(word[0], []).append(word)
    patterns = []
    for group in branches.values():
        common = commonprefix(group)
        patterns.append(re.escape(common) + _any_of([word[len(common):] for word in group]))
    return f"(?:{'|'.join(patterns)})"
