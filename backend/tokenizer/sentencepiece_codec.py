"""tokenizer.model, by the `sentencepiece` library, which is what the families were trained with.

The library knows pieces only. Special tokens stand in companion files, as transformers writes
them, and may take the place of a piece (InternLM2's `<|im_start|>` is the piece
`[UNUSED_TOKEN_146]`). A text is cut at them, and each stretch between goes to the library.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import sentencepiece

from backend import chat_formats
from backend.errors import UserError
from backend.model_files import AGAIN, read_json, special_tokens
from backend.tokenizer.codec import MAX_BYTES

FILE = "tokenizer.model"
SPACE = "▁"
ALL_SPACES = 1 << 30  # more than any text begins with
MAX_ID = 1 << 24

# Appended to a model, it is merged into it, as Protocol Buffers have it:
# ModelProto.normalizer_spec (field 3) { add_dummy_prefix (field 3): false }
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceCodec:
    """A `Codec` over a SentencePiece model.

    Args:
        model: the file's content.
        added: special token -> id, beside the model's own control symbols.
        plain: added tokens that have text in a reply.
        legacy: every stretch after a special token begins with a blank, as in the whole text's
            beginning; so do all tokenizers but newer files of Llama (`"legacy": false`).
        add_prefix_space: put that blank before the text at all.
        begin, end: ids around a text that is encoded with special tokens.

    Raises:
        UserError: it is no SentencePiece model.
    """

    def __init__(
        self, model: bytes, *, added: dict[str, int] | None = None,
        plain: dict[str, int] | None = None, legacy: bool = True, add_prefix_space: bool = True,
        begin: list[int] | None = None, end: list[int] | None = None,
    ) -> None:
        self._pieces = _processor(model)
        self._rest = _processor(model + NO_DUMMY_PREFIX)
        self._first = self._pieces if legacy or add_prefix_space else self._rest
        self._later = self._pieces if legacy else self._rest
        self._begin, self._end = begin or [], end or []
        count = self._pieces.vocab_size()
        controls = filter(self._pieces.is_control, range(count))
        control = {self._pieces.id_to_piece(i): i for i in controls}
        self.special_tokens = control | (added or {})
        self._added = self.special_tokens | (plain or {})
        self._spelled = {i: token for token, i in self._added.items()}
        self.special_ids = frozenset((*self.special_tokens.values(), self._pieces.unk_id()))
        self.vocab_size = max(count, 1 + max(self._spelled, default=-1))
        self.leading_spaces = self._leading_spaces()
        longest_first = sorted(self._added, key=len, reverse=True)
        tokens = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._cut = re.compile(f"({tokens})")

    @classmethod
    def from_folder(cls, folder: Path) -> SentencePieceCodec:
        """Of tokenizer.model, the tokens that its companions add, and those of its family.

        Raises:
            UserError: a broken file.
        """
        path = folder / FILE
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is no tokenizer: not a regular file, or too large.", AGAIN)
        model = path.read_bytes()
        pieces = _processor(model, str(path))
        settings = read_json(folder / "tokenizer_config.json")
        special, plain = _added_tokens(folder, settings)
        chat_format = chat_formats.declared(folder)
        family = {} if chat_format is None else chat_format.control_tokens
        named = {token: token for token in special_tokens(folder).values()}
        for token, piece in (named | family).items():
            known = _piece_id(pieces, piece)
            if token and token not in special and known is not None:
                special[token] = plain.pop(token, known)
        bos, eos = pieces.bos_id(), pieces.eos_id()
        return cls(
            model, added=special, plain=plain,
            legacy=settings.get("legacy") is not False,
            add_prefix_space=settings.get("add_prefix_space") is not False,
            begin=[bos] if bos >= 0 and settings.get("add_bos_token") is not False else [],
            end=[eos] if eos >= 0 and settings.get("add_eos_token") is True else [],
        )

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = self._encode(text, self._first)
        return [*self._begin, *ids, *self._end] if add_special_tokens else ids

    def encode_rest(self, text: str) -> list[int]:
        return self._encode(text, self._rest)

    def _encode(self, text: str, first: sentencepiece.SentencePieceProcessor) -> list[int]:
        ids: list[int] = []
        processor = first
        for n, part in enumerate(self._cut.split(text)):
            if n % 2:
                ids.append(self._added[part])
                processor = self._later
            elif part:
                ids += processor.encode(part)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._spelled:
            return self._spelled[token_id].encode()
        if not 0 <= token_id < self._pieces.vocab_size():
            return b""
        piece = self._pieces.id_to_piece(token_id)
        if self._pieces.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])  # <0xE4>
        return piece.replace(SPACE, " ").encode()

    def token_to_id(self, token: str) -> int | None:
        known = self._added.get(token)
        return _piece_id(self._pieces, token) if known is None else known

    def _leading_spaces(self) -> int:
        """As the library decodes: the dummy prefix; all blanks, where it also removes them."""
        if self._rest.normalize("  a") != f"{SPACE}{SPACE}a":
            return ALL_SPACES
        return int(self._first.normalize("a") == f"{SPACE}a")


def _processor(model: bytes, name: str = FILE) -> sentencepiece.SentencePieceProcessor:
    wrong = UserError(f"{name} is not a SentencePiece model.", AGAIN)
    if not model.removesuffix(NO_DUMMY_PREFIX):
        raise wrong
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError):
        raise wrong from None


def _piece_id(pieces: sentencepiece.SentencePieceProcessor, piece: str) -> int | None:
    """Id of a piece; the library's own look-up gives the unknown token's for what it lacks."""
    found = pieces.piece_to_id(piece)
    return found if pieces.id_to_piece(found) == piece else None


def _added_tokens(
    folder: Path, settings: dict[str, Any]
) -> tuple[dict[str, int], dict[str, int]]:
    """(special, plain) tokens with ids of their own, by whatever file lists them."""
    special: dict[str, int] = {}
    plain: dict[str, int] = {}

    def add(token: Any, token_id: Any, is_special: bool) -> None:
        if isinstance(token, str) and token and isinstance(token_id, int) and not isinstance(
                token_id, bool) and 0 <= token_id < MAX_ID:
            (special if is_special else plain)[token] = token_id

    for token, token_id in read_json(folder / "added_tokens.json").items():
        add(token, token_id, token.startswith("<"))
    listed = settings.get("added_tokens_decoder")
    for key, entry in listed.items() if isinstance(listed, dict) else ():
        if isinstance(entry, dict) and key.isdecimal():
            plain.pop(entry.get("content"), None)  # type: ignore[arg-type]
            special.pop(entry.get("content"), None)  # type: ignore[arg-type]
            add(entry.get("content"), int(key[:9]), entry.get("special") is True)
    return special, plain
