"""What every kind of tokenizer file can do."""

from __future__ import annotations

from typing import Protocol

MAX_BYTES = 256 << 20  # of a file; the largest tokenizer.json in use has about 35 MB


class Codec(Protocol):
    """Text to token ids, and a token id to bytes.

    Attributes:
        vocab_size: largest id + 1.
        leading_spaces: spaces that the encoder puts before a text, for the decoder to take off.
        special_tokens: spelling -> id of the tokens that are read as such wherever they stand.
        special_ids: tokens without text in a reply; those, and the unknown token.
    """

    vocab_size: int
    leading_spaces: int
    special_tokens: dict[str, int]
    special_ids: frozenset[int]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids; `add_special_tokens` begins the text as the model expects it."""

    def encode_rest(self, text: str) -> list[int]:
        """Token ids of a text that goes on from another: nothing is put before it."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for in the middle of a text; none if it is unknown."""

    def token_to_id(self, token: str) -> int | None:
        """Id of a token by its spelling in the vocabulary."""
