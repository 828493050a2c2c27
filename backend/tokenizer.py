"""Text to token ids and back, over the `tokenizers` library.

Decoding is ours: each token stands for some bytes, and a text is these bytes read as UTF-8. That
is what both families of tokenizers do (byte-level BPE, and SentencePiece with byte fallback), it
lets a stream end anywhere, and `detokenizer` and `Tokenizer.decode` agree by construction.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from backend.config import SamplingParams
from backend.errors import UserError
from backend.model_files import AGAIN, chat_template_source, read_json, special_tokens
from backend.workspace.layout import text_folder

MAX_BYTES = 256 << 20  # the largest tokenizer.json in use has about 35 MB

# Tokens by which chat templates end a turn. Some models list only their end-of-text token.
END_OF_TURN_TOKENS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<eoa>")

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how SentencePiece spells a single byte


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2): printable bytes stand for themselves, the
    others for the characters from U+0100 on, so that no token holds a blank or a control."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(0x100 + n): byte for n, byte in enumerate(others)},
    }


_ALPHABET = _byte_alphabet()


@dataclass(frozen=True)
class ByteRule:
    """How a token's spelling in the vocabulary becomes bytes.

    `replacements` are (old, new) pairs, for SentencePiece ("▁", " "); `leading_spaces` are taken
    off the beginning of a whole text, where the encoder had put them.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    leading_spaces: int = 0

    def token_bytes(self, token: str, added: bool) -> bytes:
        """Bytes of one token; an added token of byte-level BPE is spelled as it is."""
        if self.byte_level:
            if not added and all(char in _ALPHABET for char in token):
                return bytes(_ALPHABET[char] for char in token)
            return token.encode()
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token.encode()


def byte_rule(decoder: dict[str, Any] | None) -> ByteRule:
    """The rule in the `decoder` of a tokenizer.json.

    Raises:
        UserError: a kind that no causal language model uses.
    """
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    byte_level = byte_fallback = False
    replacements: list[tuple[str, str]] = []
    leading_spaces = 0
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                byte_level = True
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                leading_spaces = start
            case {"type": "Metaspace", "replacement": str(old)}:
                replacements.append((old, " "))
                leading_spaces = int(step.get("prepend_scheme") != "never")
            case _:
                steps = []
                break
    if not steps:
        kind = "none" if decoder is None else decoder.get("type")
        raise UserError(
            f"tokenizer.json has a decoder of a kind that is not supported: {kind}.",
            "Supported are byte-level BPE and SentencePiece, which all chat models use.")
    return ByteRule(byte_level, byte_fallback, tuple(replacements), leading_spaces)


class Tokenizer:
    """Encodes, decodes, and knows the tokens with a meaning of their own.

    Args:
        backend: from the `tokenizers` library.
        bos_token: text that the chat template may ask for; None if the model has none.
        eos_token_ids: ids that end a reply.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        # A tokenizer.json may carry what its last user had set; it would cut prompts silently.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        state = None if backend.decoder is None else backend.decoder.__getstate__()
        self._rule = byte_rule(None if state is None else json.loads(state))
        self._bytes: dict[int, bytes] = {}
        added = backend.get_added_tokens_decoder()
        self._added = frozenset(added)
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.bos_token = bos_token
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1  # largest id + 1

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a model folder in Hugging Face layout, or of a workspace.

        Raises:
            UserError: no folder, no tokenizer.json, or a broken file.
        """
        folder = text_folder(folder)
        backend = _load_backend(folder)
        names = special_tokens(folder)
        _mark_special(backend, read_json(folder / "tokenizer_config.json"), names)
        return cls(
            backend,
            bos_token=names.get("bos_token"),
            eos_token_ids=_eos_token_ids(folder, backend, names.get("eos_token")),
        )

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text, if the model has one."""
        return None if self.bos_token is None else self._backend.token_to_id(self.bos_token)

    @property
    def leading_spaces(self) -> int:
        """Spaces that `decode` takes off the beginning of a text."""
        return self._rule.leading_spaces

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `add_special_tokens` begins it as the model expects of a text.

        Raises:
            UserError: the text is not valid Unicode.
        """
        check_unicode(text, "The text")
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

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
            in_range = 0 <= token_id < self.vocab_size
            token = self._backend.id_to_token(token_id) if in_range else None
            if token is None:
                return b""  # models have more rows than tokens
            known = self._rule.token_bytes(token, token_id in self._added)
            self._bytes[token_id] = known
        return known

    def token_to_id(self, token: str) -> int | None:
        """Id of a token by its spelling in the vocabulary."""
        return self._backend.token_to_id(token)


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


def _load_backend(folder: Path) -> tokenizers.Tokenizer:
    if folder.is_file():
        raise UserError(f"{folder} is a file, not a model.", "Name the folder that it lies in.")
    if not folder.is_dir():
        raise UserError(f"There is no model folder {folder}.", "Check the path.")
    path = folder / "tokenizer.json"
    if not path.exists():
        if (folder / "tokenizer.model").exists():
            raise UserError(
                f"{folder} has tokenizer.model, but no tokenizer.json.",
                "Convert it once: python -c \"from transformers import AutoTokenizer as T; "
                f"T.from_pretrained('{folder}').save_pretrained('{folder}')\"")
        raise UserError(f"{folder} has no tokenizer.json.", "Download the whole model.")
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path} is no tokenizer: not a regular file, or too large.",
                        AGAIN)
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        reason = str(error).splitlines()[0][:200] if str(error) else "unknown reason"
        raise UserError(f"{path} is not a valid tokenizer: {reason}.",
                        AGAIN) from None


def _mark_special(
    backend: tokenizers.Tokenizer, settings: dict[str, Any], names: dict[str, str]
) -> None:
    """Make special what only tokenizer_config.json calls so, as transformers does."""
    wanted = list(names.values())
    listed = settings.get("added_tokens_decoder")
    for entry in listed.values() if isinstance(listed, dict) else ():
        if isinstance(entry, dict) and entry.get("special") and isinstance(
                entry.get("content"), str):
            wanted.append(entry["content"])
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens([
        AddedToken(token, special=True, normalized=False) for token in dict.fromkeys(wanted)
        if token not in known and backend.token_to_id(token) is not None
    ])


def _eos_token_ids(
    folder: Path, backend: tokenizers.Tokenizer, eos_token: str | None
) -> list[int]:
    """Ids that end a reply, by every file that names one, in a fixed order."""
    ids: list[Any] = []
    for file in ("generation_config.json", "config.json"):
        value = read_json(folder / file).get("eos_token_id")
        ids += value if isinstance(value, list) else [value]
    if eos_token is not None:
        ids.append(backend.token_to_id(eos_token))
    template = chat_template_source(folder) or ""
    special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    for token in END_OF_TURN_TOKENS:
        if token in template and token in special:
            ids.append(backend.token_to_id(token))
    return [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0]
