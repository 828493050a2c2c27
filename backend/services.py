"""What the page, the API and the terminal work with, built once and passed down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from backend.chat import ChatBackend, ChatService
from backend.chat_template import ChatTemplate
from backend.config import EngineConfig
from backend.engine.async_engine import AsyncEngine
from backend.engine.launcher import Handle, ProcessHandle
from backend.remote import RemoteChat
from backend.tokenizer import Tokenizer, sampling_defaults


@dataclass(slots=True)
class LocalModel:
    """A model that this process serves: its engine and its text side."""

    engine: AsyncEngine
    chat: ChatService
    sampling_defaults: dict[str, float]  # what the checkpoint recommends

    @classmethod
    def open(
        cls, config: EngineConfig, model_name: str, launch: Callable[[], Handle] = ProcessHandle
    ) -> LocalModel:
        """Read the text side of `config.model`; the engine is started by the caller's loop.

        Raises:
            UserError: the folder has no tokenizer that can be used.
        """
        engine = AsyncEngine(config, launch)
        tokenizer = Tokenizer.from_folder(config.model)
        template = ChatTemplate.from_folder(config.model)
        chat = ChatService(engine, tokenizer, template, model_name)
        return cls(engine, chat, sampling_defaults(config.model))


@dataclass(slots=True)
class Services:
    """One of `local` and `remote` is there."""

    local: LocalModel | None = None
    remote: RemoteChat | None = None

    @property
    def chat(self) -> ChatBackend:
        chat = self.local.chat if self.local else self.remote
        assert chat is not None
        return chat
