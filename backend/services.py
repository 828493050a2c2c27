"""What the page, the API and the terminal work with, built once and passed down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from backend.chat import ChatBackend, ChatService
from backend.chat_template import ChatTemplate
from backend.config import ChatConfig, EngineConfig
from backend.engine.async_engine import AsyncEngine
from backend.engine.launcher import Handle, ProcessHandle
from backend.errors import UserError
from backend.remote import RemoteChat
from backend.remote_http import is_loopback_url, normalise_url
from backend.tokenizer import Tokenizer, sampling_defaults


@dataclass(slots=True)
class Services:
    """Over an engine of our own (`local` is there), or over somebody's api_server (restful mode).

    Attributes:
        chat: answers messages.
        local: the same, when the engine is ours.
        default_url: of the api_server that the command line names.
        sampling_defaults: what the checkpoint recommends; fields of `SamplingParams`.
    """

    chat: ChatBackend
    local: ChatService | None = None
    default_url: str = ""
    sampling_defaults: dict[str, float] = field(default_factory=dict)

    @property
    def remote(self) -> bool:
        return self.local is None

    async def __aenter__(self) -> Services:
        """Start the engine, if it is ours; `ready` waits for it."""
        if self.local:
            await self.local.engine.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """End the engine, open replies with an error, and the template's process."""
        if self.local:
            await self.local.engine.stop()
            self.local.template.close()

    async def ready(self) -> str:
        """Wait until messages can be answered; returns what answers, in words.

        Raises:
            UserError: the model cannot be loaded; says why.
        """
        if self.local is None:
            return f"the api_server at {self.default_url}"
        info = await self.local.engine.wait_ready()
        where = info.device if info.tp == 1 else f"{info.tp} x {info.device}"
        return f"{self.local.model_name} ({info.architecture}, {info.dtype}, {where})"

    def connect(self, url: str, api_key: str) -> RemoteChat:
        """A client for an api_server that the page names, without contacting it yet.

        Raises:
            UserError: it is neither on this machine nor the one that the operator named; else
                anyone with the page could send requests from here into the operator's network.
        """
        target = normalise_url(url)
        if target != self.default_url and not is_loopback_url(target):
            raise UserError(
                f"{target} is not one of this page's servers.",
                f"Use {self.default_url or 'a server on this machine'}, or start a page for it: "
                f"python app.py serve gradio {target}",
                field="url",
            )
        return RemoteChat(target, api_key)


def local_services(
    config: EngineConfig,
    model_name: str,
    launch: Callable[[], Handle] = ProcessHandle,
    chat_config: ChatConfig | None = None,
) -> Services:
    """Services over an engine of our own. The engine is started by the caller's event loop.

    Args:
        model_name: in the API.
        chat_config: how messages become prompts.

    Raises:
        UserError: the model's folder has no tokenizer that can be used, or there is no such
            template.
    """
    template = ChatTemplate.from_config(config.model, chat_config or ChatConfig())
    chat = ChatService(
        AsyncEngine(config, launch),
        Tokenizer.from_folder(config.model),
        template,
        model_name,
    )
    return Services(chat, local=chat, sampling_defaults=sampling_defaults(config.model))


def remote_services(url: str, api_key: str = "") -> Services:
    """Services over the api_server at `url`.

    Raises:
        UserError: the URL is not one.
    """
    target = normalise_url(url)
    return Services(RemoteChat(target, api_key), default_url=target)
