"""From a command line to the prompt: which chat format is taken, and that its stop words stop."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path

import pytest

import app
from backend.chat import ChatService, Delta
from backend.chat_formats import FORMATS, ChatFormat
from backend.chat_template import ChatTemplate
from backend.config import EngineConfig, SamplingParams
from backend.engine.async_engine import AsyncEngine
from backend.engine.inline import ThreadHandle
from backend.engine.types import Sequence
from backend.errors import UserError
from tests import fake_tokenizer
from tests.server.support import Script, byte_tokenizer
from tests.tiny_model import make_checkpoint


def service(*words: str) -> ChatService:
    """What a command line would chat with; its engine is not started."""
    local = app.open_services(app.parse([*words, "--inline"])).local
    assert local is not None
    return local


@pytest.mark.parametrize("command", [["chat"], ["run"], ["serve", "api_server"]])
def test_a_template_by_the_models_name_or_on_its_own(command: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "llama2"  # a folder's name chooses nothing
    folder.mkdir()
    fake_tokenizer.save_chatml(folder)
    words = [*command, str(folder)]
    assert service(*words).template.source == fake_tokenizer.CHATML
    assert service(*words).model_name == "llama2"
    by_name = service(*words, "--model-name", "internlm2-chat-7b")
    assert by_name.model_name == "internlm2-chat-7b"
    assert by_name.template.source == FORMATS["internlm2-chat"]
    other = service(*words, "--model_name", "mine")
    assert (other.model_name, other.template.source) == ("mine", fake_tokenizer.CHATML)
    both = service(*words, "--model-name", "llama2", "--chat-template", "vicuna")
    assert (both.model_name, both.template.source) == ("llama2", FORMATS["vicuna"])
    with pytest.raises(UserError, match="no chat template called"):
        service(*words, "--chat-template", "nonsense")


def test_a_template_is_for_a_model_not_for_a_remote_server() -> None:
    for flag in ("--chat-template", "--model-name"):
        with pytest.raises(UserError, match=f"{flag} is for a model"):
            app.open_services(app.parse(["chat", "http://127.0.0.1:1", flag, "llama2"]))


def test_internlm_as_it_is_published(tmp_path: Path) -> None:
    """tokenizer.model, code of its own, no template: family, prompt and ends all the same."""
    (tmp_path / "tokenizer.model").write_bytes(
        fake_tokenizer.sentencepiece_model(user_defined_symbols="<eoh>,<eoa>"))
    (tmp_path / "tokenization_internlm.py").write_text("raise SystemExit('never run')")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"auto_map": {"AutoTokenizer": ["tokenization_internlm.InternLMTokenizer", None]},
         "bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "InternLMTokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps(
        {"architectures": ["InternLMForCausalLM"], "model_type": "internlm", "eos_token_id": 2}))
    local = service("chat", str(tmp_path))
    end = local.tokenizer.token_to_id("<eoa>")
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "the <eoa>"},
                {"role": "assistant", "content": "the"}, {"role": "user", "content": "cat"}]
    ids = asyncio.run(local.encode_chat(messages))
    assert ids[0] == 1 and ids.count(1) == 1
    assert ids.count(end) == 1  # of the template; not the one that the user typed
    shown = local.tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "")
    assert shown == (
        "<s><|System|>:s\n<|User|>:the<eoa>\n<|Bot|>:the<eoa>\n<|User|>:cat\n<|Bot|>:")
    assert local.tokenizer.eos_token_ids == (2, end)


class Repeat(Script):
    """A model that says its prompt, special tokens included, again and again."""

    def next_token(self, seq: Sequence) -> int:
        prompt = seq.request.prompt_token_ids
        return prompt[seq.num_output_tokens % len(prompt)]


def test_stop_words_of_the_format_end_a_reply() -> None:
    """The model repeats the prompt; a word ends it as text, a token as a token."""

    async def reply(template: ChatTemplate, text: str) -> Delta:
        engine = AsyncEngine(EngineConfig("fake"), partial(ThreadHandle, Repeat().build))
        chat = ChatService(engine, byte_tokenizer(), template, "m")
        await engine.start()
        try:
            await engine.wait_ready()
            messages = [{"role": "user", "content": text}]
            deltas = [d async for d in chat.stream(messages, SamplingParams(max_tokens=50))]
        finally:
            await engine.stop()
        return Delta("".join(d.text for d in deltas), deltas[-1].finish_reason)

    stopped = ChatTemplate(ChatFormat(bos=False, stop_words=("END", "<s>")))
    assert asyncio.run(reply(stopped, "one END two")) == Delta("one ", "stop")
    with_token = ChatTemplate(ChatFormat(bos=False, user="ab<s>", stop_words=("<s>",)))
    assert with_token.stops(byte_tokenizer()) == ([256], [])
    assert asyncio.run(reply(with_token, "two")) == Delta("ab", "stop")


def test_a_system_prompt_and_a_capability_by_flags(tmp_path: Path) -> None:
    fake_tokenizer.save_chatml(tmp_path)
    user = [{"role": "user", "content": "Hi"}]
    words = ["chat", str(tmp_path)]
    for flags in ((), ("--model-name", "chatml")):
        template = service(*words, *flags, "--meta-instruction", "Be brief.").template
        system = [{"role": "system", "content": "Be brief."}]
        assert template.render(user) == service(*words, *flags).template.render(system + user)
        own = [{"role": "system", "content": "Own."}, *user]
        assert "Be brief." not in template.render(own)
        plain = service(*words, *flags, "--cap", "completion").template
        assert plain.render(user) == "Hi"
    filled = [{"role": "user", "content": "a <FILL> b"}]
    infilling = service(*words, "--cap", "infilling").template
    assert infilling.render(filled).startswith("<PRE> a  <SUF>")
    with pytest.raises(UserError, match="no place in completion"):
        service(*words, "--cap", "completion", "--meta-instruction", "x")


def test_what_is_said_of_the_weights_must_be_so(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    words = ["chat", str(tmp_path)]
    service(*words, "--model-format", "hf")
    with pytest.raises(UserError, match="no 4-bit weights"):
        service(*words, "--model-format", "awq")
    with pytest.raises(UserError, match="no group size"):
        service(*words, "--group-size", "128")
