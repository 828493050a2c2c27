"""What `backend.turbomind` takes and yields, by the names of LMDeploy 0.2's `lmdeploy.messages`."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from backend.config import SamplingParams
from backend.errors import UserError


class ResponseType(enum.Enum):
    """Whether a reply goes on; by LMDeploy's names."""

    SUCCESS = enum.auto()
    FINISH = enum.auto()


class EngineOutput(NamedTuple):
    """A reply so far, as LMDeploy 0.2 has it."""

    status: ResponseType
    token_ids: list[int]
    num_token: int


@dataclass
class EngineGenerationConfig:
    """How a reply is drawn, with LMDeploy 0.2's names and defaults.

    Attributes:
        stop_words, bad_words: token ids that end a reply, and that it must not have.
    """

    n: int = 1
    max_new_tokens: int = 512
    top_p: float = 1.0
    top_k: int = 1
    temperature: float = 0.8
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    random_seed: int | None = None
    stop_words: Sequence[int] | None = None
    bad_words: Sequence[int] | None = None

    def sampling(self) -> SamplingParams:
        """The same in our words.

        Raises:
            UserError: a value that cannot be.
        """
        if self.n != 1:
            raise UserError(f"n must be 1, not {self.n!r}.",
                            "Give each reply a session of its own.", field="n")
        return SamplingParams(
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k,
            max_tokens=self.max_new_tokens, repetition_penalty=self.repetition_penalty,
            ignore_eos=self.ignore_eos, seed=self.random_seed,
            stop_token_ids=tuple(self.stop_words or ()),
            logit_bias=dict.fromkeys(self.bad_words or (), -100.0),
        )
