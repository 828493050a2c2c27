"""The real application under uvicorn on a port of its own, over an engine with a scripted model."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import httpx
import tokenizers
import uvicorn
from openai import OpenAI
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from backend.admission import Limits
from backend.chat import ChatService
from backend.chat_template import ChatTemplate
from backend.classroom import Classroom
from backend.config import EngineConfig, ServerConfig
from backend.engine.async_engine import AsyncEngine
from backend.engine.engine import Engine
from backend.engine.inline import ThreadHandle
from backend.engine.launcher import Handle
from backend.engine.types import Sequence
from backend.engine_manager import EngineManager
from backend.server.api import create_app
from backend.server.sessions import Sessions
from backend.tokenizer import Tokenizer
from backend.tokenizer.json_codec import JsonCodec
from tests.app_process import BOUND_S
from tests.fake_model import FakeRunner, fake_info

EOS = 257
NAME = "fake-model"


def byte_tokenizer() -> Tokenizer:
    """One token a byte, its id the byte's value; 256 begins a text, 257 ends a reply."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {byte: chr(byte) for byte in printable}
    spelled |= {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    backend = tokenizers.Tokenizer(BPE({spelled[byte]: byte for byte in range(256)}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(JsonCodec(backend), bos_token="<s>", eos_token_ids=[EOS])


class LastMessage(ChatTemplate):
    """A chat template that shows the last message only."""

    def __init__(self) -> None:
        super().__init__("not used")

    def render(self, messages: Any, add_generation_prompt: bool = True) -> str:
        return messages[-1]["content"]


class Script:
    """What the model says, by the beginning of the prompt.

    random: 20 letters by the request's seed. endless: never ends. crash: fails after three tokens.
    slow: as anything else, but the step waits while the engine is `held`. damaged: what comes is
    not a number. special: a special token between two letters. All else is echoed.
    """

    def __init__(self) -> None:
        self._go = threading.Event()
        self._go.set()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Prompts that begin with "slow" get no token within."""
        self._go.clear()
        try:
            yield
        finally:
            self._go.set()

    def next_token(self, seq: Sequence) -> int:
        prompt = bytes(t for t in seq.request.prompt_token_ids if t < 256)
        at = seq.num_output_tokens
        if prompt.startswith(b"random"):
            return EOS if at == 20 else ord("a") + seq.random.randrange(26)
        if prompt.startswith(b"endless"):
            return ord("a") + at % 26
        if prompt.startswith(b"crash") and at == 3:
            raise RuntimeError("the script says so")
        if prompt.startswith(b"damaged"):
            return -1
        if prompt.startswith(b"special"):
            return (ord("a"), 256, ord("b"), EOS)[at]
        if prompt.startswith(b"slow"):
            self._go.wait()
        return prompt[at] if at < len(prompt) else EOS

    def build(self, config: EngineConfig) -> Engine:
        info = fake_info(session_len=1 << 17, num_blocks=1 << 15)
        return Engine(FakeRunner(info, self.next_token))


class Served:
    """A running server and ways to talk to it.

    Over the engine that `launch` starts with `engine_config`; by default one in a thread, with a
    model that speaks as `script` says.
    """

    def __init__(
        self, config: ServerConfig, limits: Limits | None,
        launch: Callable[[], Handle] | None = None,
        engine_config: EngineConfig | None = None,
        sessions: Sessions | None = None,
    ) -> None:
        self.config = config
        self.classroom = Classroom(bool(config.host_keys), limits)
        self.script = Script()
        self.engine = AsyncEngine(
            engine_config or EngineConfig("fake"),
            launch or partial(ThreadHandle, self.script.build))
        self.chat = ChatService(
            self.engine, byte_tokenizer(), LastMessage(), NAME,
            sampling_defaults={"temperature": 0.5})
        self.engines = EngineManager(self.chat)
        self.app = create_app(
            self.engines, config, self.classroom, sessions=sessions, docs_at_root=True)
        self.loop = asyncio.new_event_loop()
        self.server = uvicorn.Server(uvicorn.Config(
            self.app, port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self.loop.run_until_complete, args=(self._serve(),))
        self._up = threading.Event()

    async def _serve(self) -> None:
        await self.engine.start()
        await self.engine.wait_ready()
        serving = asyncio.create_task(self.server.serve())
        while not self.server.started:
            await asyncio.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self._up.set()
        await serving
        await self.engine.stop()

    def __enter__(self) -> Served:
        self._thread.start()
        assert self._up.wait(60)
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.server.should_exit = True
        self._thread.join(30)

    def config_with_port(self) -> ServerConfig:
        """As it listens."""
        return replace(self.config, server_port=self.port)

    def client(self, api_key: str = "none", **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60,
                      **options)

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, verify=False, **options)

    def run(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """Run in the server's own loop."""
        return asyncio.run_coroutine_threadsafe(work(), self.loop).result(2 * BOUND_S)

    def eventually(self, condition: Callable[[], bool]) -> None:
        """Wait, within bounds, for what other threads bring about."""
        async def work() -> None:
            deadline = time.monotonic() + BOUND_S
            while not condition():
                assert time.monotonic() < deadline, "it did not come about"
                await asyncio.sleep(0.01)
        self.run(work)

    def assert_all_ended(self) -> None:
        """Insist that all open work ends by itself and leaves nothing behind."""
        admission = self.classroom.admission
        self.eventually(lambda: not self.engine._streams and not admission.total.open)
        assert admission.total.waiting == admission.waiting_tokens == 0
        # The engine tells its counts with a step; so make it take one more.
        key = self.config.api_keys[0] if self.config.api_keys else "none"
        self.client(key).completions.create(model=NAME, prompt="x")
        stats = self.engine.stats
        assert stats is not None and stats.num_running == stats.num_waiting == 0
        assert self.engine.info is not None
        assert stats.num_blocks_free + stats.num_blocks_cached == self.engine.info.num_blocks


@contextmanager
def serve(
    limits: Limits | None = None, launch: Callable[[], Handle] | None = None,
    engine_config: EngineConfig | None = None, sessions: Sessions | None = None, **config: Any,
) -> Iterator[Served]:
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    with Served(ServerConfig(**config), limits, launch, engine_config, sessions) as served:
        yield served
