"""tokenizer.json, by the `tokenizers` library. What token ids mean as bytes is ours."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from backend.errors import UserError
from backend.model_files import AGAIN, read_json, special_tokens
from backend.tokenizer.codec import MAX_BYTES

FILE = "tokenizer.json"
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


class JsonCodec:
    """A `Codec` over a tokenizer of the `tokenizers` library."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        # A tokenizer.json may carry what its last user had set; it would cut prompts silently.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        state = None if backend.decoder is None else backend.decoder.__getstate__()
        self._rule = byte_rule(None if state is None else json.loads(state))
        added = backend.get_added_tokens_decoder()
        self._added = frozenset(added)
        self.special_tokens = {t.content: i for i, t in added.items() if t.special}
        self.special_ids = frozenset(self.special_tokens.values())
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1
        self.leading_spaces = self._rule.leading_spaces

    @classmethod
    def from_folder(cls, folder: Path) -> JsonCodec:
        """Of tokenizer.json and what tokenizer_config.json adds to it.

        Raises:
            UserError: a broken file.
        """
        backend = _read(folder / FILE)
        settings = read_json(folder / "tokenizer_config.json")
        _mark_special(backend, settings, special_tokens(folder))
        return cls(backend)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_rest(self, text: str) -> list[int]:
        """The blank that SentencePiece puts before a text goes before a line break instead, which
        is a token of its own, and both are left out."""
        if not self.leading_spaces:
            return self.encode(text, False)
        front, ids = self.encode("\n", False), self.encode("\n" + text, False)
        return ids[len(front):] if ids[:len(front)] == front else self.encode(text, False)

    def token_bytes(self, token_id: int) -> bytes:
        # The library takes no negative id; models have more rows than tokens.
        token = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        return b"" if token is None else self._rule.token_bytes(token, token_id in self._added)

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)


def _read(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path} is no tokenizer: not a regular file, or too large.", AGAIN)
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        reason = str(error).splitlines()[0][:200] if str(error) else "unknown reason"
        raise UserError(f"{path} is not a valid tokenizer: {reason}.", AGAIN) from None


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
