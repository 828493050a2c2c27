"""What the web process and the engine process say to each other: msgpack, schema-checked.

Every message of the engine carries the epoch that it was started with, so that a late word from
a dead engine can be told from the living one's and dropped.
"""

from __future__ import annotations

import msgspec

from backend.config import EngineConfig
from backend.engine.types import EngineStats, ModelInfo, Request, StepInput, StepOutput


class Start(msgspec.Struct, tag=True):
    """First word to an engine process: load this, as rank 0, and serve it."""

    epoch: int
    config: EngineConfig


class StartRank(msgspec.Struct, tag=True):
    """First word to a further tensor parallel rank: load your part, then compute what comes.

    `rendezvous` is a file through which torch.distributed's ranks find one another.
    """

    config: EngineConfig
    rank: int
    rendezvous: str


class AddRequest(msgspec.Struct, tag=True):
    request: Request


class AbortRequest(msgspec.Struct, tag=True):
    request_id: str


class Shutdown(msgspec.Struct, tag=True):
    pass


class Ready(msgspec.Struct, tag=True):
    epoch: int
    info: ModelInfo
    stats: EngineStats


class LoadFailed(msgspec.Struct, tag=True):
    """The model cannot be loaded: what is wrong, and how to mend it."""

    epoch: int
    message: str
    hint: str


class Outputs(msgspec.Struct, tag=True):
    """One step. Also sent without outputs: it shows that steps progress."""

    epoch: int
    outputs: list[StepOutput]
    stats: EngineStats


Command = Start | StartRank | AddRequest | AbortRequest | Shutdown
Event = Ready | LoadFailed | Outputs

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_event = msgspec.msgpack.Decoder(Event).decode
decode_step_input = msgspec.msgpack.Decoder(StepInput).decode
