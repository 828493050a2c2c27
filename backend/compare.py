"""Two models asked the same: at once if memory holds both, else one after the other.

    side = room.model_side("/models/qwen-awq", "qwen-awq", kv=8)
    comparison = await room.start((room.served_side(), side), messages, SamplingParams(), "tab-1")
    while not comparison.ended:
        await comparison.wait(0.1)          # then look at comparison.panes

A side is what is served already, an api_server, or a model that gets an engine of its own for the
time. Such engines stay for the next question to the same pair, until they are idle for long.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from backend.chat import ChatBackend, Delta, Message
from backend.config import EngineConfig, SamplingParams
from backend.engine.launcher import Handle, ProcessHandle
from backend.engine_manager import EngineManager, LoadRequest
from backend.errors import UserError
from backend.footprint import Footprints, taken
from backend.live_reply import LiveReply
from backend.spare_engines import SpareEngines

POOL_TOKENS = 4096  # of such an engine's KV cache: it answers one question at a time

log = logging.getLogger(__name__)

# (backend, messages, sampling, model) -> the reply's deltas; such as `Classroom.reply` for a caller
Ask = Callable[[ChatBackend, Sequence[Message], SamplingParams, str | None],
               AsyncGenerator[Delta, None]]


class ServedModelLeavesError(UserError):
    """There is room only if the served model leaves the memory; `count` replies of it would end."""

    status = 409
    code = "served_model_leaves"

    def __init__(self, count: int) -> None:
        super().__init__("There is no room for this comparison beside the model that is served.",
                         "Say that it may be unloaded for the time, or choose a smaller model.")
        self.count = count


@dataclass(frozen=True)
class Side:
    """Who answers.

    Attributes:
        name: for people.
        backend: what is there already; None for a model that is to be loaded.
        load: the model that is to be loaded.
        model: its name at the backend; None is its first.
    """

    name: str
    backend: ChatBackend | None = None
    load: LoadRequest | None = None
    model: str | None = None


@dataclass(frozen=True)
class Plan:
    """How a comparison will go.

    Attributes:
        together: both sides at once; else one after the other, for want of memory if a model is to
            be loaded, else because who asks may have no two replies open.
        evicts: the served model leaves the memory for the time.
        needs: bytes that each model takes that is to be loaded.
        free: bytes of the device's memory; 0 where nothing is to be loaded.
    """

    together: bool = True
    evicts: bool = False
    needs: tuple[int, ...] = ()
    free: int = 0


class Pane:
    """A side and its reply.

    Attributes:
        state: "waiting" for the other side or for its engine's room, "loading", "writing", "ended".
        live: the reply, once it has begun.
        error: why it ended without one, or before its end.
    """

    def __init__(self, side: Side) -> None:
        self.side = side
        self.state: Literal["waiting", "loading", "writing", "ended"] = "waiting"
        self.live: LiveReply | None = None
        self.error: BaseException | None = None


class Comparison:
    """A question to both sides, being answered."""

    def __init__(
        self, sides: Sequence[Side], messages: Sequence[Message], sampling: SamplingParams,
        plan: Plan, ask: Ask,
    ) -> None:
        self.panes = tuple(Pane(side) for side in sides)
        self.messages, self.sampling, self.plan = list(messages), sampling, plan
        self.ask = ask
        self.stopped = False
        self._ended = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def ended(self) -> bool:
        """Both replies have."""
        return self._ended.is_set()

    def groups(self) -> list[list[Pane]]:
        """The panes, those together that answer at once; what is there already goes first."""
        if self.plan.together:
            return [list(self.panes)]
        return [[pane] for pane in sorted(self.panes, key=lambda pane: pane.side.load is not None)]

    async def wait(self, seconds: float | None = None) -> None:
        """Return when both replies have ended, at the latest after `seconds`, if any."""
        try:
            await asyncio.wait_for(self._ended.wait(), seconds)
        except TimeoutError:
            pass

    def stop(self) -> None:
        """End both replies here; what has come is kept."""
        if not self.ended and not self.stopped and self._task is not None:
            self.stopped = True
            self._task.cancel()


class ComparisonRoom:
    """Engines for comparisons, of one pair at a time. Belongs to one event loop.

    Args:
        engines: of the served model; None over somebody's api_server.
        launch: starts an engine.
        footprints: tells what models take, and what is free.
        sleep: waits for seconds; tests give their own.
    """

    def __init__(
        self,
        engines: EngineManager | None = None,
        launch: Callable[[], Handle] = ProcessHandle,
        *,
        footprints: Footprints | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.engines = engines
        self.spare = SpareEngines(launch, sleep)
        self._footprints = footprints or Footprints()
        self._owner = ""  # of what is open
        self._claimed = False  # somebody is about to load
        self._running: Comparison | None = None  # of those that need engines

    def served_side(self) -> Side:
        """What is served.

        Raises:
            EngineNotReadyError: no model is.
        """
        assert self.engines is not None
        return Side(self.engines.require().model_name, self.engines)

    def model_side(self, folder: str, name: str, kv: int | None = None) -> Side:
        """A model in an engine of its own, or what is served if that is the same.

        Args:
            kv: `quant_policy`; None leaves it to the model's settings.

        Raises:
            UserError: an option of the model's is not allowed.
        """
        assert self.engines is not None
        options = {
            **self.engines.defaults, "kv_cache_tokens": POOL_TOKENS, "kv_cache_gb": None,
            "max_batch_size": 1,
        }  # fmt: skip
        if kv is not None:
            options |= {"quant_policy": kv, "kv_cache_dtype": None}
        load = LoadRequest(folder, {k: v for k, v in options.items() if v is not None})
        served = self.engines.current
        if served is not None and _same(served.engine.config, load.config()):
            return Side(name, self.engines)
        return Side(name, load=load)

    async def start(
        self, sides: Sequence[Side], messages: Sequence[Message], sampling: SamplingParams,
        owner: str, *, ask: Ask | None = None, force: bool = False, together: bool = True,
    ) -> Comparison:
        """Ask both sides; engines of another pair are ended first.

        Args:
            owner: who asks; see `leave`.
            ask: asks a backend; by default directly.
            force: although the served model has to leave for it. It is loaded again afterwards.
            together: whether who asks may have both replies open at a time.

        Raises:
            ServedModelLeavesError: it has to, and not `force`.
            UserError: a model's settings are not allowed, or it does not fit at all; or somebody
                else's comparison is being answered.
        """
        loads, ask = _distinct(sides), ask or _ask
        if not loads:
            comparison = Comparison(sides, messages, sampling, Plan(together), ask)
            comparison._task = asyncio.create_task(self._run(comparison))
            return comparison
        if self._running is not None and self._running.ended and self._running._task is not None:
            await asyncio.wait({self._running._task})  # its engines are leaving
        if self._claimed:
            raise UserError("Another comparison is being answered.",
                            "Wait for its end, or stop it.")
        self._claimed = True
        try:
            await self.spare.keep_only(loads)
            plan = await self._plan(sides)
            if plan.evicts and not force:
                assert self.engines is not None
                raise ServedModelLeavesError(self.engines.num_open)
        except BaseException:
            self._claimed = False
            self.spare.idle()
            raise
        comparison = self._running = Comparison(sides, messages, sampling, plan, ask)
        self._owner = owner
        comparison._task = asyncio.create_task(self._run_loaded(comparison))
        return comparison

    async def leave(self, owner: str) -> None:
        """End what somebody has opened who has gone away."""
        if owner == self._owner:
            await self.close()

    async def close(self) -> None:
        """End the comparison that has engines of its own, and these."""
        running = self._running
        if running is not None and running._task is not None:
            running.stop()
            await asyncio.wait({running._task})
        await self.spare.keep_only([])

    # Memory

    async def _plan(self, sides: Sequence[Side]) -> Plan:
        missing = [load for load in _distinct(sides) if self.spare.get(load) is None]
        if not missing:
            return Plan()
        configs = [load.config() for load in missing]
        found = await asyncio.gather(*(self._footprints.of(config) for config in configs))
        needs = tuple(taken(made, config) for made, config in zip(found, configs))
        free = min(made.free for made in found)
        if self.spare.loads and sum(needs) > free:  # one that is kept may be in the other's way
            await self.spare.keep_only([])
            return await self._plan(sides)
        served = await self._served_bytes()
        asked = any(side.backend is self.engines for side in sides if side.backend is not None)
        ways = (
            Plan(True, False, needs, free), Plan(False, False, needs, free),
            *([Plan(True, True, needs, free)] if served and not asked else []),
            *([Plan(False, True, needs, free)] if served else []),
        )  # fmt: skip
        for plan in ways:
            room = free + (served if plan.evicts else 0)
            if (sum(needs) if plan.together else max(needs)) <= room:
                return plan
        raise UserError(
            f"The larger of the two needs about {max(needs) / 1e9:.2f} GB of memory, and "
            f"{free / 1e9:.2f} GB are free.", "Choose a smaller model, or an int8 KV cache.")

    async def _served_bytes(self) -> int:
        """That the served model would give back."""
        memory = (await self.engines.status()).memory if self.engines else None
        return memory.weights + memory.kv_cache if memory else 0

    # Replies

    async def _run_loaded(self, comparison: Comparison) -> None:
        """A comparison with engines of its own, and what is left of them afterwards."""
        plan, served = comparison.plan, self.engines.request if self.engines else None
        left = False
        try:
            for group in comparison.groups():
                if plan.evicts and not left and any(pane.side.load for pane in group):
                    assert self.engines is not None
                    await self.engines.unload(force=True)
                    left = True
                await self._answer(comparison, group)
                if not plan.together:
                    await self.spare.keep_only([])
        except asyncio.CancelledError:
            pass  # stopped
        except UserError as error:
            for pane in comparison.panes:
                pane.error = pane.error or error
        finally:
            self._end(comparison)
            await self._tidy(left, served)

    async def _tidy(self, left: bool, served: LoadRequest | None) -> None:
        try:
            await self.spare.keep_only([] if left else self.spare.loads)
            assert self.engines is not None
            if left and served is not None and self.engines.current is None:
                await self.engines.load(served.model, served.options, served.chat)
        except UserError as error:
            log.error("The model that was served cannot be loaded again: %s", error)
        finally:
            self._running, self._claimed = None, False
            self.spare.idle()

    async def _run(self, comparison: Comparison) -> None:
        """A comparison of what is there already."""
        try:
            for group in comparison.groups():
                await self._answer(comparison, group)
        except asyncio.CancelledError:
            pass
        finally:
            self._end(comparison)

    async def _answer(self, comparison: Comparison, group: Sequence[Pane]) -> None:
        """Load what the group needs, then ask all of it at once."""
        await asyncio.gather(*(
            self._load(load, [pane for pane in group if pane.side.load == load])
            for load in _distinct([pane.side for pane in group])))
        asked = [pane for pane in group if pane.error is None]
        for pane in asked:
            load = pane.side.load
            backend = pane.side.backend if load is None else self.spare.get(load)
            assert backend is not None
            pane.live = LiveReply(comparison.ask(
                backend, comparison.messages, comparison.sampling, pane.side.model))
            pane.state = "writing"
        await asyncio.gather(*(self._finish(pane) for pane in asked))

    async def _load(self, load: LoadRequest, panes: Sequence[Pane]) -> None:
        if self.spare.get(load) is not None:
            return
        for pane in panes:
            pane.state = "loading"
        try:
            await self.spare.open(load)
        except Exception as error:
            for pane in panes:
                pane.error, pane.state = error, "ended"

    async def _finish(self, pane: Pane) -> None:
        assert pane.live is not None
        try:
            await pane.live.wait()
            pane.error = pane.live.error()
        finally:
            pane.state = "ended"

    def _end(self, comparison: Comparison) -> None:
        for pane in comparison.panes:
            if pane.live is not None:
                pane.live.stop()
            pane.state = "ended"
        comparison._ended.set()


def _ask(
    backend: ChatBackend, messages: Sequence[Message], sampling: SamplingParams, model: str | None
) -> AsyncGenerator[Delta, None]:
    return backend.stream(messages, sampling, model=model)


def _distinct(sides: Sequence[Side]) -> list[LoadRequest]:
    """What is to be loaded, each once."""
    loads: list[LoadRequest] = []
    for side in sides:
        if side.load is not None and side.load not in loads:
            loads.append(side.load)
    return loads


def _same(one: EngineConfig, other: EngineConfig) -> bool:
    """Whether both engines would reply the same."""
    return os.path.realpath(one.model) == os.path.realpath(other.model) and all(
        getattr(one, name) == getattr(other, name)
        for name in ("kv_cache_bits", "dtype", "device", "kernels", "rope_scaling_factor",
                     "use_logn_attn")
    )
