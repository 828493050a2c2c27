"""Which model is served: loaded, changed, unloaded, while replies are being written."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path

import httpx
import pytest

from backend.classroom import Classroom
from backend.config import EngineConfig, SamplingParams, ServerConfig
from backend.engine.engine import Engine
from backend.engine.inline import ThreadHandle
from backend.engine_manager import EngineManager, LoadRequest, RepliesOpenError, open_chat
from backend.errors import EngineDeadError, EngineNotReadyError, UserError
from backend.model_library import ModelLibrary
from backend.server.api import create_app
from tests.app_process import ROOT
from tests.fake_model import FakeRunner, fake_info

DEMO = ROOT / "assets" / "demo_model"
ASK = [{"role": "user", "content": "Hello"}]


def babbling_engine(config: EngineConfig) -> Engine:
    """Never ends by itself, and takes its time; its vocabulary is the bundled model's."""
    info = fake_info(vocab_size=1 << 16, session_len=1 << 14, num_blocks=1 << 12)
    return Engine(FakeRunner(info, lambda sequence: 300, step_s=0.01))


LAUNCH = partial(ThreadHandle, babbling_engine)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another model: the bundled one's tokenizer under another name."""
    return Path(shutil.copytree(DEMO, tmp_path / "other", ignore=lambda *_: ["train", "exam"]))


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 120))


def new_manager(**options) -> EngineManager:
    request = LoadRequest(str(DEMO))
    return EngineManager(open_chat(request, LAUNCH), LAUNCH, request=request, **options)


async def reply(manager: EngineManager) -> str:
    text = ""
    sampling = SamplingParams(max_tokens=3, ignore_eos=True)
    async with aclosing(manager.stream(ASK, sampling)) as deltas:
        async for delta in deltas:
            text += delta.text
    return text


async def begin(manager: EngineManager) -> asyncio.Task[str]:
    """A reply that goes on for long; the engine is at work on it."""

    async def long() -> str:
        sampling = SamplingParams(max_tokens=5000, ignore_eos=True)
        async with aclosing(manager.stream(ASK, sampling)) as deltas:
            async for _ in deltas:
                pass
        return "complete"

    task = asyncio.create_task(long())
    while manager.num_open == 0:
        await asyncio.sleep(0.01)
    return task


def test_another_model_takes_the_place(other: Path):
    async def test():
        manager = new_manager()
        await manager.start()
        await manager.require().engine.wait_ready()
        assert await manager.models() == ["demo_model"]
        await reply(manager)
        first = manager.require()
        second = await manager.load(str(other), {"max_batch_size": 7})
        await second.engine.wait_ready()
        assert await manager.models() == ["other"] and manager.require() is second
        assert second.engine.config.max_batch_size == 7
        assert first.engine.state == "failed"
        await reply(manager)
        with pytest.raises(EngineNotReadyError, match="unloaded"):  # who still holds the old one
            async with aclosing(first.stream(ASK, SamplingParams())) as deltas:
                await anext(deltas)
        again = await manager.restart()
        await again.engine.wait_ready()
        assert again is not second and again.engine.config.max_batch_size == 7
        await manager.stop()

    run(test)


def test_without_a_model():
    async def test():
        manager = EngineManager(None, LAUNCH)
        await manager.start()
        assert (await manager.status()).state == "unloaded"
        assert await manager.models() == []
        with pytest.raises(EngineNotReadyError, match="No model is loaded"):
            await reply(manager)
        with pytest.raises(EngineNotReadyError):
            await manager.restart()
        chat = await manager.load(str(DEMO))
        await chat.engine.wait_ready()
        await reply(manager)
        await manager.unload()
        assert (await manager.status()).state == "unloaded"
        await manager.stop()

    run(test)


def test_open_replies_are_asked_for_and_end_in_an_error(other: Path):
    async def test():
        manager = new_manager()
        await manager.start()
        await manager.require().engine.wait_ready()
        replies = [await begin(manager)]
        replies.append(asyncio.create_task(reply(manager)))
        await replies[1]
        for change in (lambda: manager.load(str(other)), manager.unload, manager.restart):
            with pytest.raises(RepliesOpenError) as caught:
                await change()
            assert caught.value.count == 1
        with pytest.raises(UserError, match="session_len must be at least 16"):
            await manager.load(str(other), {"session_len": 0})  # wrong, whatever is open
        assert not replies[0].done()
        await manager.load(str(other), force=True)
        with pytest.raises(EngineDeadError, match="unloaded to load other"):
            await replies[0]
        await manager.stop()

    run(test)


def test_what_can_be_told_beforehand_costs_nobody_the_model(other: Path):
    async def test():
        manager = new_manager()
        await manager.start()
        await manager.require().engine.wait_ready()
        with pytest.raises(UserError, match="session_len"):
            await manager.load(str(other), {"session_len": 1})
        (other / "tokenizer.json").write_text("{}")
        with pytest.raises(UserError, match="tokenizer.json"):
            await manager.load(str(other))
        assert await manager.models() == ["demo_model"]
        await reply(manager)
        await manager.stop()

    run(test)


def test_a_failing_model_is_told_and_another_can_be_loaded():
    def broken(config):
        raise UserError("The weights are damaged.", "Download them again.")

    async def test():
        builds = [broken, babbling_engine]
        manager = EngineManager(None, lambda: ThreadHandle(builds.pop(0)))
        chat = await manager.load(str(DEMO))
        with pytest.raises(UserError, match="damaged"):
            await chat.engine.wait_ready()
        status = await manager.status()
        assert status.state == "failed" and "damaged" in status.detail
        chat = await manager.load(str(DEMO))
        await chat.engine.wait_ready()
        await reply(manager)
        await manager.stop()

    run(test)


def picky_engine(config: EngineConfig) -> Engine:
    """Loads no model called other, and none for a batch of 3."""
    if config.model.endswith("other") or config.max_batch_size == 3:
        raise UserError("The weights are damaged.", "Download them again.")
    return babbling_engine(config)


def test_the_old_model_comes_back_if_the_new_one_does_not_load(other: Path):
    async def until_ready(manager: EngineManager) -> None:
        while manager.current is None or manager.current.engine.state != "ready":
            await asyncio.sleep(0.01)

    async def test():
        launch = partial(ThreadHandle, picky_engine)
        request = LoadRequest(str(DEMO), {"max_batch_size": 5})
        manager = EngineManager(open_chat(request, launch), launch, request=request)
        await manager.start()
        await manager.require().engine.wait_ready()
        chat = await manager.load(str(other))
        with pytest.raises(UserError, match="damaged"):
            await chat.engine.wait_ready()
        await until_ready(manager)
        assert await manager.models() == ["demo_model"] and manager.request is request
        assert manager.require().engine.config.max_batch_size == 5
        while not manager.notice:
            await asyncio.sleep(0.01)
        status = await manager.status()
        assert status.detail.startswith("other could not be loaded: The weights are damaged.")
        assert status.detail.endswith("demo_model is served again.")
        await reply(manager)
        # Its own settings were changed to what it cannot load with: it goes on with the former.
        manager.request = LoadRequest(str(DEMO), {"max_batch_size": 3})
        chat = await manager.restart()
        with pytest.raises(UserError, match="damaged"):
            await chat.engine.wait_ready()
        await until_ready(manager)
        assert manager.require().engine.config.max_batch_size == 5
        await manager.stop()

    run(test)


def test_the_command_lines_flags_hold_for_later_models(other: Path):
    async def test():
        manager = new_manager(defaults={"max_batch_size": 9, "session_len": 64})
        await manager.start()
        chat = await manager.load(str(other), {"session_len": None})
        assert chat.engine.config.max_batch_size == 9
        assert chat.engine.config.session_len is None
        await manager.stop()

    run(test)


def test_two_changes_at_a_time_are_one_too_many(other: Path):
    async def test():
        manager = new_manager()
        await manager.start()
        await manager.require().engine.wait_ready()
        results = await asyncio.gather(
            manager.load(str(other)), manager.load(str(DEMO)), return_exceptions=True)
        errors = [r for r in results if isinstance(r, UserError)]
        assert len(errors) <= 1 and all("at this moment" in str(e) for e in errors)
        served = [r for r in results if not isinstance(r, BaseException)]
        assert manager.current in served
        await manager.stop()

    run(test)


def test_the_api_serves_what_is_loaded(other: Path):
    async def test():
        manager = new_manager()
        app = create_app(manager, ServerConfig(), Classroom())
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            await manager.start()
            await manager.require().engine.wait_ready()

            async def names() -> list[str]:
                return [m["id"] for m in (await http.get("/v1/models")).json()["data"]]

            async def ask(model: str) -> httpx.Response:
                return await http.post("/v1/chat/completions", json={
                    "model": model, "messages": ASK, "max_tokens": 2})

            assert await names() == ["demo_model"]
            assert (await ask("demo_model")).status_code == 200
            assert "demo_model" in (await http.get("/docs")).text
            chat = await manager.load(str(other))
            await chat.engine.wait_ready()
            assert await names() == ["other"]
            assert (await ask("demo_model")).status_code == 404
            assert (await ask("other")).status_code == 200
            assert "<code>other</code>" in (await http.get("/docs")).text
            await manager.unload()
            assert await names() == []
            answer = await ask("other")
            assert answer.status_code == 503 and "No model is loaded" in answer.text
            assert (await http.get("/health")).status_code == 503
            assert (await http.get("/metrics")).status_code == 200

    run(test)


# Which models a page may name


@pytest.fixture
def library(tmp_path: Path, other: Path) -> ModelLibrary:
    root = tmp_path / "models"
    (root / "Org").mkdir(parents=True)
    shutil.move(other, root / "Org" / "Model")
    shutil.copytree(root / "Org" / "Model", root / "Org" / ".Half.download")
    (root / "notes").mkdir()
    return ModelLibrary(DEMO, [root])


def test_models_that_are_there(library: ModelLibrary, tmp_path: Path):
    found = {model.name: model for model in library.models()}
    assert set(found) == {"demo_model", "Org/Model"}
    assert found["demo_model"].kind == "bundled" and found["Org/Model"].kind == "folder"
    size = sum(p.stat().st_size for p in DEMO.glob("*.safetensors"))
    assert found["Org/Model"].bytes == size
    (tmp_path / "models" / "Org" / "Model" / ".download.json").write_text(json.dumps({}))
    assert {m.name: m.kind for m in library.models()}["Org/Model"] == "download"


def test_paths_from_a_page(library: ModelLibrary, tmp_path: Path):
    model = tmp_path / "models" / "Org" / "Model"
    assert library.checked(str(model)) == model.resolve()
    assert library.checked(str(DEMO)) == DEMO.resolve()
    (tmp_path / "models" / "link").symlink_to("/etc")
    for path in ("/etc", str(model / ".." / ".." / ".."), f"{model}/../../../../etc", "", "\0",
                 str(tmp_path / "models" / "link"), str(tmp_path / "modelsX"), None, 7):
        with pytest.raises(UserError):
            library.checked(path)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no model"):
        library.checked(str(model.with_name("absent")))
