"""What the page, the API and the terminal work with, built once and passed down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from backend.chat import ChatBackend, ChatService
from backend.classroom import Classroom, Invitation
from backend.compare import ComparisonRoom
from backend.data_dir import data_dir, results_dir
from backend.engine.launcher import Handle, ProcessHandle
from backend.engine_manager import EngineManager, LoadRequest, open_chat
from backend.errors import UserError
from backend.history import History
from backend.jobs import JobStore
from backend.model_library import ModelLibrary
from backend.remote import RemoteChat
from backend.remote_http import is_loopback_url, normalise_url


@dataclass(slots=True)
class Services:
    """Over an engine of our own (`engines` is there), or over somebody's api_server (restful mode).

    Attributes:
        chat: answers messages; the same as `engines`, when the engine is ours.
        engines: loads and unloads the served model.
        default_url: in restful mode, of the api_server that the command line names.
        jobs: long tasks; None where there is no page that could start them.
        library: the models that a page may offer; None as with `jobs`.
        invitation: what students need to come in; None where there is no class.
        classroom: who is here, and what work of theirs is open: on the page and by the API.
        history: the page's chats; in memory, until a page is served that keeps them on disk.
        comparisons: of models, some of them with engines of their own.
    """

    chat: ChatBackend
    engines: EngineManager | None = None
    default_url: str = ""
    jobs: JobStore | None = None
    library: ModelLibrary | None = None
    classroom: Classroom = field(default_factory=Classroom)
    invitation: Invitation | None = None
    history: History = field(default_factory=History)
    comparisons: ComparisonRoom = field(default_factory=ComparisonRoom)

    @property
    def remote(self) -> bool:
        """Restful mode."""
        return bool(self.default_url)

    @property
    def local(self) -> ChatService | None:
        """What an engine of our own serves at this moment; None if there is none, or no model."""
        return self.engines.current if self.engines else None

    @property
    def sampling_defaults(self) -> dict[str, float]:
        """What the checkpoint recommends; fields of `SamplingParams`."""
        return self.local.sampling_defaults if self.local else {}

    async def __aenter__(self) -> Services:
        """Start the engine, if it is ours; `ready` waits for it."""
        if self.engines:
            await self.engines.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """End the engine, open replies with an error, and the template's process."""
        await self.comparisons.close()
        if self.engines:
            await self.engines.stop()

    async def ready(self) -> str:
        """Wait until messages can be answered; returns what answers, in words.

        Raises:
            UserError: the model cannot be loaded; says why.
        """
        if self.remote:
            return f"the api_server at {self.default_url}"
        if self.local is None:
            return "no model yet"
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
    request: LoadRequest, launch: Callable[[], Handle] = ProcessHandle, *, load: bool = True
) -> Services:
    """Services over engines of our own. The first is started by the caller's event loop.

    Args:
        request: what to serve; its options hold for all models that are loaded later, too.
        load: false leaves it to the page to load a model.

    Raises:
        UserError: as `open_chat`.
    """
    current = open_chat(request, launch) if load else None
    engines = EngineManager(
        current, launch, defaults=request.options, request=request if load else None)
    return Services(engines, engines, comparisons=ComparisonRoom(engines, launch))


def add_desk(services: Services, bundled: Path, model_dirs: Sequence[str] = ()) -> None:
    """Give services over engines of our own what only a page needs: jobs, and models to choose.

    Without a home directory nothing can be kept, so there are no jobs then.
    """
    roots = [Path(folder).expanduser().absolute() for folder in model_dirs]
    request = services.engines.request if services.engines else None
    if request is not None:
        roots.insert(0, Path(request.model).absolute())
    with suppress(UserError):
        services.jobs = JobStore(data_dir() / "jobs")
        roots += [results_dir(), data_dir() / "models"]
    services.library = ModelLibrary(bundled, roots)


def remote_services(url: str, api_key: str = "") -> Services:
    """Services over the api_server at `url`.

    Raises:
        UserError: the URL is not one.
    """
    target = normalise_url(url)
    return Services(RemoteChat(target, api_key), default_url=target)
