"""The exam's own reader: our engine, greedy, all questions at once by continuous batching."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from backend.chat_template import ChatTemplate
from backend.config import EngineConfig, SamplingParams
from backend.engine.types import Request
from backend.engine.worker import build_engine
from backend.tokenizer import Tokenizer


class EngineReader:
    """Answers conversations with the checkpoint in `model_dir`.

    Raises:
        UserError: the folder cannot be loaded.
    """

    def __init__(self, model_dir: Path, *, max_tokens: int, dtype: str = "auto") -> None:
        self.engine = build_engine(EngineConfig(model=str(model_dir), dtype=dtype))
        self.tokenizer = Tokenizer.from_folder(model_dir)
        self.template = ChatTemplate.from_folder(model_dir)
        self.sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)

    def answer_all(self, conversations: Sequence[list[dict[str, str]]]) -> Iterator[str]:
        """One answer a conversation, in order."""
        answers: dict[str, list[int]] = {}
        for number, messages in enumerate(conversations):
            prompt = self.template.encode(messages, self.tokenizer)
            eos = list(self.tokenizer.eos_token_ids)
            self.engine.add_request(Request(str(number), prompt, self.sampling, eos))
            answers[str(number)] = []
        while self.engine.has_work():
            for output in self.engine.step():
                answers[output.request_id] += output.token_ids
        self.template.close()
        return (self.tokenizer.decode(ids) for ids in answers.values())
