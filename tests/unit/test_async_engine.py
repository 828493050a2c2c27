"""The asyncio side of an engine: streams, abort, death, restart, hang; child process and inline."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial

import pytest

from backend.config import EngineConfig, SamplingParams
from backend.engine.async_engine import AsyncEngine
from backend.engine.engine import Engine
from backend.engine.inline import ThreadHandle
from backend.engine.launcher import ProcessHandle
from backend.engine.messages import Outputs, encode
from backend.engine.types import EngineStats, Request, Sequence, StepOutput
from backend.errors import EngineDeadError, EngineNotReadyError, UserError
from tests.fake_model import FakeRunner, fake_engine, fake_info

CHILD = partial(ProcessHandle, (sys.executable, "-m", "tests.fake_worker"))
INLINE = partial(ThreadHandle, fake_engine)
EOS = 257


def request(name: str, prompt: list[int], **sampling) -> Request:
    return Request(name, prompt, SamplingParams(**sampling), [EOS])


@asynccontextmanager
async def running(launch, **options) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(EngineConfig(model="fake"), launch, **options)
    await engine.start()
    try:
        await engine.wait_ready()
        yield engine
    finally:
        await engine.stop()


async def reply(engine: AsyncEngine, made: Request) -> list[int]:
    tokens: list[int] = []
    async with aclosing(engine.generate(made)) as outputs:
        async for output in outputs:
            tokens += output.token_ids
    return tokens


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for a condition that other threads bring about; bounded."""
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come about")


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 120))


@pytest.mark.parametrize("launch", [CHILD, INLINE], ids=["child", "inline"])
def test_many_streams_are_not_mixed_and_aborts_free_everything(launch):
    async def test():
        async with running(launch) as engine:
            assert engine.stats is not None and engine.info is not None
            assert engine.stats.num_blocks_free == engine.info.num_blocks  # told before any step

            async def one(i: int) -> None:
                prompt = [i % 256, i // 256] * 20
                made = request(str(i), prompt, max_tokens=60)
                if i % 3 == 0:
                    async with aclosing(engine.generate(made)) as outputs:
                        async for output in outputs:
                            assert output.token_ids[0] == prompt[0]
                            break
                else:
                    assert await reply(engine, made) == [*prompt, EOS]

            await asyncio.gather(*(one(i) for i in range(90)))
            assert await reply(engine, request("last", [5])) == [5, EOS]
            stats = engine.stats
            assert stats.num_running == stats.num_waiting == 0
            assert stats.num_blocks_free + stats.num_blocks_cached == engine.info.num_blocks
            assert engine.healthy()

    run(test)


def test_death_ends_every_request_and_the_engine_comes_back():
    async def test():
        async with running(CHILD) as engine:
            epoch, pid = engine.epoch, engine.pid
            assert pid is not None
            prompt = [7] * 1500  # long enough to be at work still
            streams = [engine.generate(request(str(i), prompt)) for i in range(8)]
            for stream in streams:
                await anext(stream)
            os.kill(pid, signal.SIGKILL)
            for stream in streams:
                with pytest.raises(EngineDeadError):
                    async for _ in stream:
                        pass
            with pytest.raises(EngineNotReadyError):
                await reply(engine, request("while down", [1]))
            assert not engine.healthy()
            await eventually(lambda: engine.state == "ready")
            assert engine.epoch == epoch + 1
            assert await reply(engine, request("again", [1, 2])) == [1, 2, EOS]

    run(test)


def test_dying_again_and_again_gives_up(monkeypatch):
    monkeypatch.setattr("backend.engine.async_engine.RESTART_DELAYS_S", (0.0, 0.0))

    async def test():
        engine = AsyncEngine(
            EngineConfig(model="fake"), partial(ProcessHandle, (sys.executable, "-c", ""))
        )
        await engine.start()
        with pytest.raises(UserError, match="died"):
            await engine.wait_ready()
        assert engine.state == "failed" and not engine.healthy()
        with pytest.raises(EngineNotReadyError, match="died .* Start the server again"):
            engine.require_ready()
        await engine.stop()

    run(test)


def test_a_hanging_engine_is_not_healthy_until_it_goes_on():
    async def test():
        now, gate = [0.0], threading.Event()

        def build(config: EngineConfig) -> Engine:
            def next_token(seq: Sequence) -> int:
                assert gate.wait(60)
                return EOS

            return Engine(FakeRunner(fake_info(), next_token))

        async with running(partial(ThreadHandle, build), clock=lambda: now[0]) as engine:
            now[0] = 1000.0
            assert engine.healthy()  # idle for long
            task = asyncio.create_task(reply(engine, request("a", [7])))
            await asyncio.sleep(0)  # the request is on its way
            now[0] = 1029.0
            assert engine.healthy()
            now[0] = 1031.0
            assert not engine.healthy()
            gate.set()
            assert await task == [EOS]
            assert engine.healthy()

    run(test)


def test_a_hanging_engine_is_not_healthy_because_its_clients_gave_up():
    async def test():
        now, gate = [0.0], threading.Event()

        def build(config: EngineConfig) -> Engine:
            def next_token(seq: Sequence) -> int:
                assert gate.wait(60)
                return EOS

            return Engine(FakeRunner(fake_info(), next_token))

        async with running(partial(ThreadHandle, build), clock=lambda: now[0]) as engine:
            task = asyncio.create_task(reply(engine, request("a", [7])))
            await asyncio.sleep(0)  # the request is on its way
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert engine.healthy()
            now[0] = 31.0
            assert not engine.healthy()
            task = asyncio.create_task(reply(engine, request("b", [7])))
            await asyncio.sleep(0)
            assert not engine.healthy()  # someone new does not make it so
            gate.set()
            assert await task == [EOS]
            await eventually(engine.healthy)

    run(test)


def test_a_restart_that_cannot_even_begin_is_tried_again(monkeypatch):
    monkeypatch.setattr("backend.engine.async_engine.RESTART_DELAYS_S", (0.0,) * 5)

    async def test():
        failures = [OSError("no memory")] * 2

        def launch():
            if engine.epoch > 1 and failures:
                raise failures.pop()
            return INLINE() if engine.epoch > 1 else CHILD()

        engine = AsyncEngine(EngineConfig(model="fake"), launch)
        await engine.start()
        await engine.wait_ready()
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        await eventually(lambda: not failures)
        await engine.wait_ready()  # waits for the new one
        assert engine.state == "ready"
        assert await reply(engine, request("again", [1])) == [1, EOS]
        await engine.stop()

    run(test)


def test_a_restart_without_memory_is_tried_again(monkeypatch):
    monkeypatch.setattr("backend.engine.async_engine.RESTART_DELAYS_S", (0.0,) * 5)

    async def test():
        refusals = [UserError("No memory is free.", "Free some.")] * 2

        def build(config: EngineConfig) -> Engine:
            if refusals:
                raise refusals.pop()
            return fake_engine(config)

        engine = AsyncEngine(
            EngineConfig(model="fake"),
            lambda: ThreadHandle(build) if engine.epoch > 1 else CHILD(),
        )
        await engine.start()
        await engine.wait_ready()
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        await eventually(lambda: not refusals)
        await engine.wait_ready()
        assert await reply(engine, request("again", [1])) == [1, EOS]
        await engine.stop()

    run(test)


def test_after_stop_requests_are_refused_at_once():
    async def test():
        async with running(INLINE) as engine:
            pass
        assert not engine.healthy()
        with pytest.raises(EngineNotReadyError, match="stopped. Start the server again."):
            await reply(engine, request("late", [1]))

    run(test)


def test_late_words_of_a_dead_epoch_are_dropped():
    async def test():
        async with running(INLINE) as engine:
            stream = engine.generate(request("a", [1, 2, 3]))
            first = await anext(stream)
            late = Outputs(engine.epoch - 1, [StepOutput("a", [99])], EngineStats())
            engine._on_event(late)
            rest = [t async for output in stream for t in output.token_ids]
            assert first.token_ids + rest == [1, 2, 3, EOS]

    run(test)


def test_a_request_that_cannot_run_fails_alone():
    async def test():
        async with running(CHILD) as engine:
            outputs = [o async for o in engine.generate(request("bad", [1] * 5000))]
            assert outputs[-1].finish_reason == "error" and "5000" in outputs[-1].error
            assert await reply(engine, request("good", [4])) == [4, EOS]

    run(test)


def test_a_model_that_cannot_be_loaded_says_why():
    async def test():
        def build(config):
            raise UserError("The folder is empty.", "Name another.")

        engine = AsyncEngine(EngineConfig(model="fake"), partial(ThreadHandle, build))
        await engine.start()
        with pytest.raises(UserError, match="The folder is empty. Name another."):
            await engine.wait_ready()
        assert engine.state == "failed"
        await engine.stop()

    run(test)


def test_no_process_outlives_stop():
    async def test():
        async with running(CHILD) as engine:
            pid = engine.pid
        assert pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    run(test)


def test_an_engine_that_speaks_when_the_loop_is_closed_is_heard_by_nobody(monkeypatch):
    """A process that is slow to end may have sent a step's outputs before it does."""
    complaints: list[object] = []
    monkeypatch.setattr(threading, "excepthook", complaints.append)
    ours, theirs = multiprocessing.Pipe()
    engine = AsyncEngine(EngineConfig(model="fake"))

    async def start() -> None:
        engine._loop = asyncio.get_running_loop()

    asyncio.run(start())
    reader = threading.Thread(target=engine._read, args=(ours, 1))
    reader.start()
    theirs.send_bytes(encode(Outputs(1, [], EngineStats())))
    theirs.close()
    reader.join(60)
    assert not reader.is_alive() and not complaints
