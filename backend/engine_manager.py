"""Which model is served now: one door to it for page and API, and the ways to change it.

`EngineManager` is a `ChatBackend` itself, over whatever is loaded at the moment; who needs the
model's tokenizer or engine for one request takes `require()` once, and keeps to it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from backend.chat import ChatService, Delta, Message, ServiceStatus
from backend.chat_formats import template_choice
from backend.chat_template import ChatTemplate
from backend.config import ChatConfig, EngineConfig, SamplingParams, validate
from backend.engine.async_engine import AsyncEngine
from backend.engine.launcher import Handle, ProcessHandle
from backend.errors import EngineNotReadyError, UserError
from backend.tokenizer import Tokenizer, sampling_defaults
from backend.workspace.settings import engine_options, model_name

logger = logging.getLogger(__name__)

UNLOADED = "No model is loaded."


class RepliesOpenError(UserError):
    """The model is in use: `count` replies are being written, which would end."""

    status = 409
    code = "replies_open"

    def __init__(self, count: int) -> None:
        replies = "1 reply is" if count == 1 else f"{count} replies are"
        super().__init__(f"{replies} being written by the model that is loaded now.",
                         "Wait, or say that they may end.")
        self.count = count


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What was asked to be loaded; the same again is a restart.

    Attributes:
        model: folder of a model or workspace.
        options: fields of `EngineConfig` that were chosen; they go before a workspace's
            config.ini, and that before the defaults.
        chat: its name in the API, and how messages become prompts.
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    chat: ChatConfig = ChatConfig()

    def config(self) -> EngineConfig:
        """The engine's settings. Raises UserError if one is not allowed."""
        options = dict(self.options)
        own = engine_options(self.model, options)
        # The engine's process has another working directory.
        config = EngineConfig(**{**own, **options, "model": os.path.abspath(self.model)})
        validate(config)
        return config

    @property
    def given_name(self) -> str | None:
        """The name that somebody gave it: now, or when the workspace was made."""
        return self.chat.model_name or model_name(self.model)


class EngineManager:
    """Belongs to one event loop, but for what `open_chat` does.

    Args:
        current: what is served from the start; `start` starts its engine.
        launch: starts an engine; a process of its own by default.
        defaults: fields of `EngineConfig` as flags of the command line set them, for every model
            that is loaded.
        request: what `current` was made of.
    """

    def __init__(
        self,
        current: ChatService | None = None,
        launch: Callable[[], Handle] = ProcessHandle,
        *,
        defaults: Mapping[str, Any] | None = None,
        request: LoadRequest | None = None,
    ) -> None:
        self.current = current
        self.request = request
        self.defaults = dict(defaults or {})
        self.notice = ""  # what became of the last change, if it was not what was asked for
        self._launch = launch
        self._watch: asyncio.Task[None] | None = None
        self._changing = ""  # the model that another gives way to at this moment
        self._lock = asyncio.Lock()

    @property
    def num_open(self) -> int:
        """Replies that are being written or wait: of chats, API and comparisons."""
        return self.current.engine.num_open if self.current else 0

    def require(self) -> ChatService:
        """What is served now, perhaps still loading.

        Raises:
            EngineNotReadyError: no model is loaded.
        """
        if self.current is None:
            raise EngineNotReadyError(UNLOADED, "Load one on the page, or name it at the start.")
        return self.current

    async def start(self) -> None:
        """Start the engine of the model given at first, if one was; `load` starts others."""
        if self.current:
            await self.current.engine.start()

    async def load(
        self,
        model: str,
        options: Mapping[str, Any] | None = None,
        chat: ChatConfig | None = None,
        *,
        force: bool = False,
    ) -> ChatService:
        """Serve another model instead; returns when it is being loaded, `wait_ready` of its engine
        waits. The old one leaves the memory before the new one enters it; if the new one then turns
        out not to load, the old one comes back as it was, and `notice` says so.

        Args:
            model, chat: see `LoadRequest`. Paths from a page go through `ModelLibrary.checked`
                first.
            options: fields of `EngineConfig`, before the command line's; None in place of a value
                leaves that to config.ini and the default.
            force: although replies are being written; they end in an error.

        Raises:
            RepliesOpenError: they are, and not `force`.
            UserError: what can be told without the weights, such as a wrong option or a missing
                tokenizer; then the old model stays. Or another change is going on.
        """
        chosen = {k: v for k, v in {**self.defaults, **(options or {})}.items() if v is not None}
        request = LoadRequest(model, chosen, chat or ChatConfig())
        await asyncio.to_thread(request.config)  # nobody is asked about replies for a wrong option
        self._check_unused(force)
        service = await asyncio.to_thread(open_chat, request, self._launch)
        before = self._as_it_is()
        try:
            await self._change(service, request, force)
        except BaseException:
            if self.current is not service:
                service.template.close()
            raise
        if before is not None:
            self._watch = asyncio.create_task(self._restore_if_failed(service, *before))
        return service

    async def unload(self, *, force: bool = False) -> None:
        """Give the model's memory back. Raises as `load` does."""
        await self._change(None, None, force)

    async def restart(self, *, force: bool = False) -> ChatService:
        """Load what is loaded anew, as after a change of config.ini. Raises as `load` does.

        Raises:
            EngineNotReadyError: nothing is loaded.
        """
        self.require()
        if self.request is None:
            raise UserError("This model cannot be loaded anew.", "Choose one of the list.")
        request = self.request
        return await self.load(request.model, request.options, request.chat, force=force)

    async def stop(self, reason: str = "The server was stopped.") -> None:
        """End the engine, open replies with an error, and the template's process."""
        chat, self.current = self.current, None
        if chat is not None:
            await chat.engine.stop(reason)
            chat.template.close()

    # ChatBackend

    async def models(self) -> list[str]:
        return [self.current.model_name] if self.current else []

    async def status(self) -> ServiceStatus:
        if self._changing:
            return ServiceStatus("loading", self._changing, "The model before it is leaving.")
        if self.current is None:
            return ServiceStatus("unloaded", "", UNLOADED)
        status = await self.current.status()
        return replace(status, detail=self.notice) if status.state == "ready" else status

    async def count_tokens(self, messages: Sequence[Message]) -> int | None:
        return await self.require().count_tokens(messages)

    async def stream(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams,
        *,
        stop: Sequence[str] = (),
        model: str | None = None,
        owner: str = "",
    ) -> AsyncGenerator[Delta, None]:
        """See `ChatService.stream`."""
        chat = self.require()
        deltas = chat.stream(messages, sampling, stop=stop, model=model, owner=owner)
        async with aclosing(deltas):
            async for delta in deltas:
                yield delta

    # Change

    def _check_unused(self, force: bool) -> None:
        if self._lock.locked():
            raise UserError("Another model is being loaded or unloaded at this moment.",
                            "Try again in a moment.")
        if self.num_open and not force:
            raise RepliesOpenError(self.num_open)

    async def _change(
        self, chat: ChatService | None, request: LoadRequest | None, force: bool
    ) -> None:
        self._check_unused(force)
        async with self._lock:
            self._changing = chat.model_name if chat else ""
            try:
                what = f"to load {chat.model_name}" if chat else "for now"
                await self.stop(f"The model was unloaded {what}.")
                self.current, self.request, self.notice = chat, request, ""
                if chat is not None:
                    await chat.engine.start()
            finally:
                self._changing = ""

    def _as_it_is(self) -> tuple[LoadRequest, LoadRequest] | None:
        """What is served, ready: how it was asked for, and the same with the settings that it has
        now, whatever its config.ini says by then. None if there is nothing to come back to."""
        if self.current is None or self.request is None or self.current.engine.state != "ready":
            return None
        options = asdict(self.current.engine.config)
        del options["model"]
        return self.request, replace(self.request, options=options)

    async def _restore_if_failed(
        self, service: ChatService, request: LoadRequest, settings: LoadRequest
    ) -> None:
        try:
            await service.engine.wait_ready()
            return
        except UserError as error:
            reason = str(error)
        try:
            if self.current is not service:
                return  # somebody has chosen again
            before = await asyncio.to_thread(open_chat, settings, self._launch)
            if self.current is not service:
                before.template.close()
                return
            await self._change(before, request, force=True)
        except UserError as error:
            logger.warning("%s cannot be served again: %s", settings.model, error)
            return
        self.notice = " ".join((f"{service.model_name} could not be loaded: {reason}",
                                f"{before.model_name} is served again."))


def open_chat(request: LoadRequest, launch: Callable[[], Handle] = ProcessHandle) -> ChatService:
    """A service for a model, its engine not started yet. Everything is checked that can be without
    the weights.

    Raises:
        UserError: an option is not allowed, or the folder has no tokenizer or chat template that
            can be used.
    """
    config, name = request.config(), request.given_name
    template = template_choice(request.chat.chat_template, name)
    return ChatService(
        AsyncEngine(config, launch),
        Tokenizer.from_folder(config.model),
        ChatTemplate.from_config(config.model, replace(request.chat, chat_template=template)),
        name or os.path.basename(config.model),
        sampling_defaults=sampling_defaults(config.model),
    )
