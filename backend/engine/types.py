"""The nouns of the engine. Read this first: everything else moves these.

`Request` and `StepOutput` cross the process border (as msgspec messages); `Sequence` and `Batch`
live inside the engine.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal

from backend.config import SamplingParams

FinishReason = Literal["stop", "length", "error"]


class StepOutOfMemoryError(Exception):
    """The device has no room for a step; nothing of it was started."""


@dataclass(slots=True)
class Request:
    """One reply to produce.

    Attributes:
        request_id: unique among all requests of an engine, made by the server, never by a client.
        prompt_token_ids: at least one id, each below the vocabulary size.
        eos_token_ids: the model's end-of-reply ids, honoured unless `sampling.ignore_eos`.
        owner: whose it is, as the server knows them. Owners take turns (see `waiting.py`), and
            share no prefixes, so that no one can time another's prompts out of the cache.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    eos_token_ids: list[int] = field(default_factory=list)
    owner: str = ""


@dataclass(slots=True)
class TokenLogprob:
    """Log-probability of a drawn token under the model (before penalties and temperature).

    `top` holds (token id, log-probability) of the likeliest tokens, best first.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(slots=True)
class StepOutput:
    """What one step brought for one request. The last one carries `finish_reason`.

    With `finish_reason == "stop"` the last of `token_ids` is the stop token itself, counted in
    usage but not part of the text. With "error", `error` says why, in one sentence.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] | None = None
    num_cached_tokens: int = 0  # prompt tokens whose KV came from the prefix cache
    error: str = ""


@dataclass(slots=True, eq=False)
class Sequence:
    """A request at work: its tokens, how many of them have KV, and where that KV lies.

    `token_ids` is prompt plus reply, as far as the host knows it; `num_pending_tokens` more were
    drawn (or are being drawn) on the device. The next forward pass computes positions
    `num_computed_tokens ...`; once they reach `num_tokens`, a new token is drawn.
    """

    request: Request
    token_ids: list[int]
    stop_ids: frozenset[int]
    max_tokens: int  # of the reply; bounded by the context
    random: random.Random  # this request's own, so that a seed means the same in any batch
    unused_uniforms: list[float] = field(default_factory=list)  # of `random`, next one last
    num_computed_tokens: int = 0  # computed, or launched to be
    num_pending_tokens: int = 0
    drawn_row: int = 0  # where the last launched step draws this one's token
    is_finished: bool = False  # or aborted: what is still on its way is dropped
    was_admitted: bool = False  # before; if again, it comes back after preemption
    num_cached_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    block_runs: list[list[int]] = field(default_factory=list)  # the table as [first, count] runs
    block_hashes: list[bytes] = field(default_factory=list)  # of the full blocks, chained
    num_hashed_blocks: int = 0  # blocks of the table that the prefix index knows
    rope_step: int = 0  # of its KV: see ModelInfo.rope_bounds

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        """Prompt and reply, with what the host does not know yet."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)


@dataclass(slots=True)
class ScheduledSequence:
    """`num_tokens` of `sequence`, from its `num_computed_tokens` on, are computed in this step.

    `samples` is true when they reach the sequence's end, so that a token is drawn.
    """

    sequence: Sequence
    num_tokens: int
    samples: bool


@dataclass(slots=True)
class Batch:
    """The work of one step."""

    scheduled: list[ScheduledSequence]

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens for s in self.scheduled)


@dataclass(slots=True)
class DrawParams:
    """What `kernels.ops.sample` draws with, a number a row; top_k 0 means all."""

    temperature: list[float] = field(default_factory=list)
    top_k: list[int] = field(default_factory=list)
    top_p: list[float] = field(default_factory=list)
    min_p: list[float] = field(default_factory=list)
    uniform: list[float] = field(default_factory=list)


@dataclass(slots=True)
class StepInput:
    """A batch as plain numbers, the same for every tensor parallel rank.

    T tokens of S sequences one after another; `kv_runs` as in `kernels.ops.AttentionMetadata`.
    """

    token_ids: list[int]  # [T]; -1 - row: the token that the step before draws in that row
    positions: list[int]  # [T]
    slot_mapping: list[int]  # [T]
    query_lens: list[int]  # [S]
    seq_lens: list[int]  # [S]
    kv_runs: list[list[tuple[int, int]]]  # [S]
    block_tables: list[list[int]]  # [S]
    sample_rows: list[int]  # tokens whose logits are wanted
    rope_steps: list[int]  # [S]
    # How the device draws from them; None: rank 0 draws, for what the device cannot do.
    draw: DrawParams | None = None


@dataclass(slots=True)
class SampledToken:
    """A token drawn for a scheduled sequence, in the order of the batch's sampling sequences.

    `token_id` is -1 when the model's output for it was not a number.
    """

    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(slots=True)
class ModelInfo:
    """What an engine serves, told once when it is ready."""

    architecture: str
    device: str  # "cpu" or the GPU's name
    dtype: str
    vocab_size: int
    session_len: int  # tokens, prompt and reply
    max_batch_size: int
    num_blocks: int
    block_size: int
    kv_bits: int  # of an element of the KV cache
    quantization: str  # of the weights, such as awq; empty if there is none
    weight_bytes: int  # on this device, all ranks together
    kv_bytes_per_token: int
    tp: int
    # Longest sequence of each step of the rotary frequencies; the last holds session_len tokens.
    rope_bounds: tuple[int, ...] = ()
    # Of the GPUs' memory, taken by PyTorch when the engine was ready, all ranks together.
    device_bytes: int = 0


@dataclass(slots=True)
class EngineStats:
    """Gauges after a step."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks_free: int = 0  # neither owned nor cached
    num_blocks_cached: int = 0  # hold a prefix that no one uses at the moment
    num_preemptions: int = 0  # since start
    num_steps: int = 0
    num_prompt_tokens: int = 0  # computed or taken from the cache, since start
    num_cached_tokens: int = 0  # of these, taken from the cache
    num_output_tokens: int = 0
