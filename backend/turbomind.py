"""The tutorials' Python integration, over our own engine in this process.

    from backend import turbomind as tm            # LMDeploy: from lmdeploy import turbomind as tm

    tm_model = tm.TurboMind.from_pretrained(path, model_name="internlm-chat-20b")
    generator = tm_model.create_instance()
    input_ids = tm_model.tokenizer.encode(tm_model.model.get_prompt("Hello"))
    for outputs in generator.stream_infer(session_id=0, input_ids=[input_ids]):
        res, tokens = outputs[0]
    print(tm_model.tokenizer.decode(res.tolist()))

Names and shapes are LMDeploy 0.1's; with a `gen_config`, 0.2's:

    from backend.messages import EngineGenerationConfig    # LMDeploy: from lmdeploy.messages
    config = EngineGenerationConfig(max_new_tokens=64)
    for status, token_ids, count in generator.stream_infer(0, input_ids, gen_config=config): ...

Sessions are lists of token ids: what is said again is found in
the engine's prefix cache, and nothing else is kept of them.
"""

from __future__ import annotations

import argparse
import asyncio
import difflib
import queue
import threading
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, overload

import torch

from backend.chat import ChatService
from backend.chat_template import ChatTemplate
from backend.config import ChatConfig, EngineConfig, SamplingParams
from backend.detokenizer import Detokenizer
from backend.errors import UserError
from backend.hub_commands import model_folder
from backend.messages import EngineGenerationConfig, EngineOutput, ResponseType
from backend.target import is_address, open_services
from backend.tokenizer import Tokenizer

T = TypeVar("T")
OPTIONS = [f.name for cls in (EngineConfig, ChatConfig) for f in fields(cls) if f.name != "model"]
ANSWER = "\ufdd0"  # a code point that no text has


class Prompt(str):
    """Text that begins as the model expects: nothing is put before it when it is encoded."""


class Model:
    """How messages become prompts."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def get_prompt(self, prompt: str, sequence_start: bool = True) -> Prompt:
        """What the user says as the model was trained to see it, up to where the reply begins.

        Args:
            sequence_start: it begins a conversation; else it goes on behind a reply.

        Raises:
            UserError: the model has no chat template, or one that refuses the conversation.
        """
        user = {"role": "user", "content": prompt}
        if sequence_start:
            return self.messages2prompt([user])
        before = [{"role": "user", "content": "."}, {"role": "assistant", "content": ANSWER}]
        text = self._template.render([*before, user])
        _, found, rest = text.partition(ANSWER)
        if not found:
            raise UserError("The model's chat template leaves out earlier replies.")
        return Prompt(rest)

    def messages2prompt(self, messages: Sequence[dict[str, Any]]) -> Prompt:
        """A whole conversation, as `get_prompt`."""
        return Prompt(self._template.render(messages))


class TokenizerOfModel:
    """Text and token ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids; of plain text, begun as the model expects it, of a `Prompt` as it is."""
        return self._tokenizer.encode(text, add_special_tokens=not isinstance(text, Prompt))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(ids, skip_special_tokens)


@dataclass
class _Session:
    token_ids: list[int] = field(default_factory=list)
    running: Future[None] | None = None


class TurboMind:
    """A loaded model. `close` gives its memory back; so does leaving a `with` over it.

    Attributes:
        model_name: as given, else the workspace's or the folder's.
        session_len: longest conversation in tokens.
        model, tokenizer: see their classes.
    """

    def __init__(self, service: ChatService) -> None:
        self._service = service
        self._sessions: dict[int, _Session] = {}
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="turbomind", daemon=True).start()
        try:
            self.session_len = self._wait(self._start())
        except BaseException:
            self.close()
            raise
        self.model_name = service.model_name
        self.model = Model(service.template)
        self.tokenizer = TokenizerOfModel(service.tokenizer)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, model_name: str | None = None,
        model_format: str | None = None, group_size: int = 0, **options: Any,
    ) -> TurboMind:
        """Load a model.

        Args:
            pretrained_model_name_or_path: folder of a model or workspace, or a model's id.
            model_name: one of the chat formats' names chooses that format.
            model_format, group_size: compared with what the model's files say.
            options: fields of EngineConfig and ChatConfig, such as `tp` and `session_len`.

        Raises:
            UserError: an unknown option, or the model cannot be loaded.
        """
        for name in options:
            if name not in OPTIONS:
                near = difflib.get_close_matches(name, OPTIONS, 1)
                hint = f"Did you mean {near[0]}?" if near else ""
                raise UserError(f"There is no option {name}.", hint, field=name)
        if is_address(pretrained_model_name_or_path):
            raise UserError(
                f"{pretrained_model_name_or_path} is a server, not a model.",
                "Use any OpenAI client with it.",
            )
        if model_name is not None:
            options["model_name"] = model_name
        args = argparse.Namespace(
            model=model_folder(pretrained_model_name_or_path), model_format=model_format,
            group_size=group_size, inline=True, **options,
        )
        service = open_services(args).local
        assert service is not None
        return cls(service)

    def create_instance(self) -> TurboMindInstance:
        """What asks the model. Several may be at work, each in a thread of its own."""
        return TurboMindInstance(self)

    def close(self) -> None:
        """End the engine; the object is of no use then."""
        if not self._loop.is_closed() and self._loop.is_running():
            self._wait(self._service.engine.stop())
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._service.template.close()

    def __enter__(self) -> TurboMind:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def _start(self) -> int:
        await self._service.engine.start()
        return (await self._service.engine.wait_ready()).session_len

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class TurboMindInstance:
    """Asks a model. See `stream_infer`."""

    def __init__(self, tm_model: TurboMind) -> None:
        self._tm = tm_model

    @overload
    def stream_infer(
        self, session_id: int | Sequence[int], input_ids: Any, *,
        gen_config: EngineGenerationConfig, sequence_start: bool = True, sequence_end: bool = False,
        step: int = 0, stop: bool = False, stream_output: bool = False,
    ) -> Iterator[EngineOutput]: ...

    @overload
    def stream_infer(
        self, session_id: int | Sequence[int], input_ids: Any, request_output_len: int = 512,
        sequence_start: bool = True, sequence_end: bool = False, step: int = 0, stop: bool = False,
        top_p: float = 0.8, top_k: int = 40, temperature: float = 0.8,
        repetition_penalty: float = 1.0, ignore_eos: bool = False, random_seed: int | None = None,
        stream_output: bool = False, gen_config: None = None,
    ) -> Iterator[list[tuple[torch.Tensor, int]]]: ...

    def stream_infer(
        self,
        session_id: int | Sequence[int],
        input_ids: Any,
        request_output_len: int = 512,
        sequence_start: bool = True,
        sequence_end: bool = False,
        step: int = 0,
        stop: bool = False,
        top_p: float = 0.8,
        top_k: int = 40,
        temperature: float = 0.8,
        repetition_penalty: float = 1.0,
        ignore_eos: bool = False,
        random_seed: int | None = None,
        stream_output: bool = False,
        gen_config: EngineGenerationConfig | None = None,
    ) -> Iterator[Any]:
        """Replies, as lists with one entry for each prompt: its tokens so far, and their number.

        Args:
            session_id: of one prompt, or a list of them.
            input_ids: token ids of a prompt, or of several: lists or tensors.
            request_output_len: tokens of a reply at most.
            sequence_start: forget what the session had; else the prompt goes on behind it.
            sequence_end: forget the session afterwards.
            step: keep only so many of the session's tokens; 0 keeps all.
            stop: only end the reply that another thread gets in this session; what it has is kept.
            stream_output: an entry of the iterator for each step, not only for the whole replies.
            gen_config: instead of the arguments about sampling, for one prompt.

        Yields:
            Of each prompt, (int64 [n], n); the token that ended a reply is not among them, nor are
            those of a text that ends a turn by the chat template. With a `gen_config` one
            EngineOutput, with ids as a list.

        Raises:
            UserError: a session that is not there or busy, or a prompt that does not fit.
        """
        ids = [session_id] if isinstance(session_id, int) else list(session_id)
        if stop:
            for number in ids:
                self._stop(number, forget=sequence_end)
            return
        prompts = _prompts(input_ids)
        if len(prompts) != len(ids) or len(set(ids)) != len(ids):
            raise UserError(
                f"There are {len(prompts)} prompts for {len(ids)} sessions.",
                "Give each prompt a session_id of its own.",
                field="session_id",
            )
        if gen_config is not None:
            if len(ids) != 1:
                raise UserError("A gen_config is for one prompt.", "Ask for one after another.",
                                field="gen_config")
            sampling = gen_config.sampling()
        else:
            sampling = SamplingParams(
                temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=request_output_len,
                repetition_penalty=repetition_penalty, ignore_eos=ignore_eos, seed=random_seed,
            )
        sessions = [self._open(number, sequence_start, step) for number in ids]
        replies: list[list[int]] = [[] for _ in ids]
        news: queue.SimpleQueue[Future[None] | None] = queue.SimpleQueue()  # None: a step
        for session, prompt, reply in zip(sessions, prompts, replies):
            work = self._reply(session.token_ids + prompt, sampling, reply, news)
            session.running = asyncio.run_coroutine_threadsafe(work, self._tm._loop)
            session.running.add_done_callback(news.put)
        left = len(ids)
        try:
            while left:
                if (ended := news.get()) is not None:
                    left -= 1
                    if not ended.cancelled():  # else it was stopped
                        ended.result()
                if not (stream_output or not left):
                    continue
                if gen_config is None:
                    yield [(torch.tensor(r, dtype=torch.int64), len(r)) for r in replies]
                else:
                    status = ResponseType.SUCCESS if left else ResponseType.FINISH
                    yield EngineOutput(status, list(replies[0]), len(replies[0]))
        finally:
            for number, session, prompt, reply in zip(ids, sessions, prompts, replies):
                assert session.running is not None
                ended, session.running = session.running, None
                ended.cancel()
                if ended.cancelled() or ended.exception() is None:
                    session.token_ids += [*prompt, *reply]
                if sequence_end:
                    self._tm._sessions.pop(number, None)

    async def _reply(
        self, prompt: list[int], sampling: SamplingParams, reply: list[int],
        news: queue.SimpleQueue[Future[None] | None],
    ) -> None:
        """Gather a reply's tokens, and tell of each step. Tokens that may begin a text that ends
        the turn are held back until that is known."""
        service = self._tm._service
        text = Detokenizer(service.tokenizer, () if sampling.ignore_eos else service.stop)
        drawn: list[int] = []
        sure = 0  # tokens whose text is certain
        chars = 0
        async with aclosing(service.engine.generate(service.request(prompt, sampling))) as outputs:
            async for output in outputs:
                if output.finish_reason == "error":
                    raise UserError(output.error)
                ended = output.finish_reason == "stop"
                for token_id in output.token_ids[:-1] if ended else output.token_ids:
                    drawn.append(token_id)
                    chars += len(text.add([token_id]))
                    if text.stopped is not None:
                        while sure < len(drawn) and self._num_chars(drawn[:sure]) < chars:
                            sure += 1
                        reply += drawn[len(reply) : sure]
                        return
                    if not text.holds:
                        sure = len(drawn)
                if output.finish_reason is not None:
                    sure = len(drawn)
                reply += drawn[len(reply) : sure]
                if output.finish_reason is None:
                    news.put(None)

    def _num_chars(self, token_ids: Sequence[int]) -> int:
        return len(self._tm._service.tokenizer.decode(token_ids))

    def _open(self, number: int, start: bool, step: int) -> _Session:
        known = self._tm._sessions.get(number)
        if known is not None and known.running is not None:
            raise UserError(f"Session {number} is busy with another prompt.",
                            "Wait for its reply, or use another session_id.", field="session_id")
        if start:
            known = self._tm._sessions[number] = _Session()
        if known is None:
            raise UserError(f"There is no session {number}.", "Begin it with sequence_start=True.",
                            field="session_id")
        if not 0 <= step <= len(known.token_ids):
            raise UserError(f"Session {number} has {len(known.token_ids)} tokens, not {step}.",
                            field="step")
        if step:
            del known.token_ids[step:]
        return known

    def _stop(self, number: int, forget: bool) -> None:
        session = self._tm._sessions.get(number)
        if session is not None and session.running is not None:
            session.running.cancel()
        if forget:
            self._tm._sessions.pop(number, None)


def _prompts(input_ids: Any) -> list[list[int]]:
    given = input_ids.tolist() if hasattr(input_ids, "tolist") else list(input_ids)
    if not given or isinstance(given[0], int):
        given = [given]
    return [list(prompt.tolist() if hasattr(prompt, "tolist") else prompt) for prompt in given]
