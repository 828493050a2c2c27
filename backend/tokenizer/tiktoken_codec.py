"""qwen.tiktoken (Qwen, the first of its name), by the `tiktoken` library; nothing is downloaded.

The file has only the byte pairs and their ranks. Pattern and special tokens are those of Qwen's
own tokenizer: special tokens follow the last rank.
"""

from __future__ import annotations

import base64
import binascii
import unicodedata
from pathlib import Path

import tiktoken

from backend.errors import UserError
from backend.model_files import AGAIN, read_text

FILE = "qwen.tiktoken"
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205)))


class TiktokenCodec:
    """A `Codec` over byte pairs by rank.

    Args:
        ranks: bytes of a token -> its rank, which is its id; 0 to len(ranks) - 1, and every
            single byte among them.
    """

    leading_spaces = 0

    def __init__(self, ranks: dict[bytes, int]) -> None:
        self.special_tokens = {token: len(ranks) + n for n, token in enumerate(SPECIAL)}
        self.special_ids = frozenset(self.special_tokens.values())
        self.vocab_size = len(ranks) + len(SPECIAL)
        self._bytes = {rank: token for token, rank in ranks.items()}
        self._bytes |= {i: token.encode() for token, i in self.special_tokens.items()}
        self._ids = {token: i for i, token in self._bytes.items()}
        self._encoding = tiktoken.Encoding(
            "qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens)

    @classmethod
    def from_folder(cls, folder: Path) -> TiktokenCodec:
        """Of qwen.tiktoken: a line a token, base64 and rank.

        Raises:
            UserError: a broken file.
        """
        path = folder / FILE
        ranks: dict[bytes, int] = {}
        for number, line in enumerate((read_text(path) or "").splitlines(), 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                raise UserError(f"{path}, line {number}: no token and rank.", AGAIN) from None
        complete = all(bytes([byte]) in ranks for byte in range(256))
        if not complete or sorted(ranks.values()) != list(range(len(ranks))):
            raise UserError(f"{path} is not complete.", AGAIN)
        return cls(ranks)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """See `Codec`; Qwen begins its texts with nothing.

        Raises:
            UserError: hundreds of thousands of blanks in a row, on which the library gives up.
        """
        text = unicodedata.normalize("NFC", text)
        try:
            return self._encoding.encode(text, allowed_special="all", disallowed_special=())
        except ValueError as error:
            raise UserError(f"The text cannot be encoded: {error}.") from None

    def encode_rest(self, text: str) -> list[int]:
        return self.encode(text, False)

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes.get(token_id, b"")

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token.encode())
