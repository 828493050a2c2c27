"""Two models asked the same: at once, one after the other, and who has to leave for it."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest

from backend.compare import (
    POOL_TOKENS,
    Comparison,
    ComparisonRoom,
    Pane,
    ServedModelLeavesError,
    Side,
)
from backend.config import EngineConfig, SamplingParams
from backend.engine.engine import Engine
from backend.engine.inline import ThreadHandle
from backend.engine_manager import EngineManager, LoadRequest, open_chat
from backend.errors import UserError
from backend.footprint import PROCESS_BYTES, Footprint, taken
from backend.memory import MemoryStatus
from tests.app_process import ROOT
from tests.fake_model import FakeRunner, fake_info

DEMO = ROOT / "assets" / "demo_model"
ASK = [{"role": "user", "content": "Hello"}]
SHORT = SamplingParams(max_tokens=3, ignore_eos=True)
LONG = SamplingParams(max_tokens=5000, ignore_eos=True)
WEIGHTS = 1_000_000_000


def babbling_engine(config: EngineConfig) -> Engine:
    """Never ends by itself; its vocabulary is the bundled model's."""
    assert "broken" not in config.model
    info = fake_info(vocab_size=1 << 16, session_len=1 << 14, num_blocks=1 << 12)
    return Engine(FakeRunner(info, lambda sequence: 300, step_s=0.005))


LAUNCH = partial(ThreadHandle, babbling_engine)


class Memory:
    """Stands in for `Footprints`: models of a GB on a device with `free` bytes, less what the
    served model takes, and the comparison's engines."""

    def __init__(self, free: int, manager: EngineManager) -> None:
        self.free, self.manager, self.room = free, manager, ComparisonRoom()
        manager.status = self.status  # type: ignore[method-assign]

    async def of(self, config: EngineConfig) -> Footprint:
        size = self.size(config)
        free = self.free - size * (len(self.room.spare.loads) + bool(self.manager.current))
        return self._footprint(free)

    def size(self, config: EngineConfig) -> int:
        return taken(self._footprint(0), config)

    def _footprint(self, free: int) -> Footprint:
        return Footprint("cpu", "float32", "", WEIGHTS, 2, 2, 8, 32, False, 2048, 320, 64, 128,
                         1 << 40, free)

    async def status(self):
        from backend.chat import ServiceStatus

        current = self.manager.current
        if current is None:
            return ServiceStatus("unloaded", "")
        return ServiceStatus("ready", current.model_name, memory=MemoryStatus(
            0, 0, 0, WEIGHTS, PROCESS_BYTES + (100 << 20)))


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    """Three models: the bundled one's tokenizer under other names."""
    def copy(name: str) -> str:
        return str(shutil.copytree(DEMO, tmp_path / name, ignore=lambda *_: [
            "train", "exam", "model.safetensors"]))
    return {name: copy(name) for name in ("first", "second", "broken")}


Scene = tuple[EngineManager, ComparisonRoom]


def run(free_models: float, test: Callable[..., Awaitable[None]], **options) -> None:
    """With a served model, and memory for so many models beside it."""
    async def whole() -> None:
        request = LoadRequest(str(DEMO))
        manager = EngineManager(open_chat(request, LAUNCH), LAUNCH, request=request)
        await manager.start()
        await manager.require().engine.wait_ready()
        memory = Memory(0, manager)
        room = ComparisonRoom(manager, LAUNCH, footprints=memory, **options)  # type: ignore
        memory.room = room
        size = memory.size(LoadRequest(str(DEMO), {"kv_cache_tokens": POOL_TOKENS}).config())
        memory.free = int(size * (1 + free_models)) + 1000
        try:
            await test(manager, room)
        finally:
            await room.close()
            await manager.stop()

    asyncio.run(asyncio.wait_for(whole(), 120))


def texts(comparison: Comparison) -> list[str]:
    return [pane.live.text if pane.live else "" for pane in comparison.panes]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def writing(comparison: Comparison) -> bool:
    return all(pane.live and pane.live.text for pane in comparison.panes)


def test_both_at_once_and_engines_stay_for_the_next_question(models):
    async def test(manager: EngineManager, room: ComparisonRoom) -> None:
        sides = [room.model_side(models[name], name) for name in ("first", "second")]
        comparison = await room.start(sides, ASK, LONG, "anna")
        assert comparison.plan.together and not comparison.plan.evicts
        await until(lambda: writing(comparison))
        assert [pane.state for pane in comparison.panes] == ["writing", "writing"]
        figures = comparison.panes[0].live.so_far
        assert figures.completion_tokens >= 1 and figures.ttft_s > 0
        with pytest.raises(UserError, match="Another comparison"):
            await room.start(sides, ASK, SHORT, "bert")
        comparison.stop()
        await comparison.wait()
        assert comparison.ended and all(texts(comparison)) and len(room.spare.loads) == 2
        engines = [service.engine for _, service in room.spare._open]
        again = await room.start(sides, ASK, SHORT, "anna")
        await again.wait()
        assert again.plan.needs == () and [s.engine for _, s in room.spare._open] == engines
        assert [pane.live.stats.completion_tokens for pane in again.panes] == [3, 3]
        await room.leave("bert")
        assert len(room.spare.loads) == 2
        await room.leave("anna")  # her tab was closed
        assert len(room.spare.loads) == 0 and [e.state for e in engines] == ["failed", "failed"]
        assert manager.require().engine.state == "ready"

    run(2, test)


def test_one_after_the_other_where_memory_holds_one(models):
    async def test(manager: EngineManager, room: ComparisonRoom) -> None:
        sides = [room.model_side(models[name], name) for name in ("first", "second")]
        most = 0
        comparison = await room.start(sides, ASK, SHORT, "anna")
        assert not comparison.plan.together and not comparison.plan.evicts
        while not comparison.ended:
            most = max(most, len(room.spare.loads))
            await comparison.wait(0.01)
        assert most == 1 and all(texts(comparison))
        again = await room.start(sides, ASK, SHORT, "anna")  # waits until the engines have left
        await again.wait()
        assert all(texts(again))
        await asyncio.wait({again._task})
        assert len(room.spare.loads) == 0 and manager.num_open == 0

    run(1, test)


def test_the_served_model_leaves_only_when_somebody_says_so(models):
    async def test(manager: EngineManager, room: ComparisonRoom) -> None:
        sides = [room.model_side(models[name], name) for name in ("first", "second")]
        served = manager.require()
        with pytest.raises(ServedModelLeavesError) as question:
            await room.start(sides, ASK, SHORT, "anna")
        assert question.value.count == 0 and manager.current is served
        comparison = await room.start(sides, ASK, SHORT, "anna", force=True)
        await comparison.wait()
        assert not comparison.plan.together and comparison.plan.evicts and all(texts(comparison))
        await asyncio.wait({comparison._task})
        assert manager.require() is not served  # loaded anew
        await manager.require().engine.wait_ready()
        assert len(room.spare.loads) == 0

    run(0, test)


def test_the_served_model_answers_before_it_leaves(models):
    async def test(manager: EngineManager, room: ComparisonRoom) -> None:
        sides = [room.model_side(models["first"], "first"), room.served_side()]
        comparison = await room.start(sides, ASK, SHORT, "anna", force=True)
        assert not comparison.plan.together and comparison.plan.evicts
        await comparison.wait()
        assert all(texts(comparison))
        assert comparison.panes[1].live.started < comparison.panes[0].live.started

    run(0, test)


def test_what_fits_nowhere_is_refused(models):
    async def test(manager: EngineManager, room: ComparisonRoom) -> None:
        side = room.model_side(models["first"], "first")
        with pytest.raises(UserError, match="GB are free"):
            await room.start([side, side], ASK, SHORT, "anna", force=True)
        comparison = await room.start([room.served_side()] * 2, ASK, SHORT, "anna")
        await comparison.wait()
        assert all(texts(comparison)) and len(room.spare.loads) == 0

    run(-0.9, test)


def test_the_same_model_needs_one_engine(models):
    async def test(manager: EngineManager, room: ComparisonRoom) -> None:
        assert room.model_side(str(DEMO), "demo").backend is manager
        assert room.model_side(str(DEMO), "demo", 8).load is not None
        side = room.model_side(models["first"], "first")
        comparison = await room.start([side, side], ASK, SHORT, "anna")
        await comparison.wait()
        assert all(texts(comparison)) and len(room.spare.loads) == 1
        other = [room.model_side(models["second"], "second"), room.served_side()]
        await (await room.start(other, ASK, SHORT, "anna")).wait()  # the pair before has left
        assert len(room.spare.loads) == 1

    run(1, test)


def test_a_model_that_cannot_be_loaded_leaves_the_other_its_reply(models):
    async def test(manager: EngineManager, room: ComparisonRoom) -> None:
        os.remove(Path(models["broken"]) / "tokenizer.json")
        sides = [room.model_side(models["broken"], "broken"), room.served_side()]
        comparison = await room.start(sides, ASK, SHORT, "anna")
        await comparison.wait()
        broken, good = comparison.panes
        assert isinstance(broken.error, UserError) and broken.live is None
        assert good.error is None and good.live.text
        await asyncio.wait({comparison._task})
        assert len(room.spare.loads) == 0

    run(1, test)


def test_stop_while_a_model_is_loading(models):
    async def test(manager: EngineManager, room: ComparisonRoom) -> None:
        sides = [room.model_side(models["first"], "first"), room.served_side()]
        comparison = await room.start(sides, ASK, SHORT, "anna")
        await until(lambda: comparison.panes[0].state == "loading")
        comparison.stop()
        comparison.stop()
        await comparison.wait()
        await asyncio.wait({comparison._task})
        assert [pane.state for pane in comparison.panes] == ["ended"] * 2
        assert texts(comparison) == ["", ""]
        await (again := await room.start(sides, ASK, SHORT, "anna")).wait()
        assert all(texts(again))

    run(1, test)


def test_idle_engines_leave(models):
    asked, over = [], asyncio.Event()

    async def sleep(seconds: float) -> None:
        asked.append(seconds)
        await over.wait()

    async def test(manager: EngineManager, room: ComparisonRoom) -> None:
        sides = [room.model_side(models["first"], "first"), room.served_side()]
        comparison = await room.start(sides, ASK, SHORT, "anna")
        await comparison.wait()
        await until(lambda: bool(asked))
        assert len(room.spare.loads) == 1
        over.set()
        await until(lambda: len(room.spare.loads) == 0)

    run(1, test, sleep=sleep)


def test_an_error_of_a_backend_is_its_panes(models):
    class Refusing:
        async def stream(self, *args, **options):
            raise UserError("No.")
            yield

    async def test(manager: EngineManager, room: ComparisonRoom) -> None:
        sides = [Side("refusing", Refusing()), room.served_side()]  # type: ignore[arg-type]
        comparison = await room.start(sides, ASK, SHORT, "anna")
        await comparison.wait()
        first: Pane = comparison.panes[0]
        assert str(first.error) == "No." and texts(comparison)[1]

    run(1, test)
