"""Chat templates: the same text as transformers, and no way to hurt the server."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from backend.chat_formats import FORMATS, ChatFormat
from backend.chat_template import MAX_CHARS, MAX_MESSAGES, ChatTemplate, check_messages
from backend.errors import UserError
from backend.tokenizer import Tokenizer
from tests import fake_tokenizer
from tests.fake_tokenizer import CHATML

QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = """
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("conversation roles must alternate user and assistant") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and loop.last %}
            {{- "[AVAILABLE_TOOLS] " ~ tools | tojson }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""
EXTRAS = """
    {% macro show(m) %}{% generation %}{{ m | tojson }}{% endgeneration %}{% endmacro %}
{% for message in messages %}
    {% if loop.index0 == 1 %}
        {% continue %}
    {% endif %}
{{ show(message) }} {{ message | tojson(indent=2) }} {{ dict(a=1) | tojson(sort_keys=true) }}
    {% if loop.index0 == 3 %}{% break %}{% endif %}
{% endfor %}
{{ strftime_now('%') }}{{ documents }}{{ enable_thinking is defined }}
"""
TEMPLATES = {
    "chatml": CHATML, "qwen2": QWEN2, "llama2": LLAMA2, "llama3": LLAMA3, "mistral": MISTRAL,
    "extras": EXTRAS,
}
SYSTEM = {"role": "system", "content": "  Be <kind> & \"short\".\n"}
USER = {"role": "user", "content": " 你好 😀 {{ 7 * 7 }} <|im_end|>\x00 "}
ASSISTANT = {"role": "assistant", "content": "Hi!\n"}
CONVERSATIONS = [[USER], [SYSTEM, USER], [SYSTEM, USER, ASSISTANT, USER], [USER, ASSISTANT]]
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def chatml() -> Iterator[ChatTemplate]:
    with closing(ChatTemplate(CHATML)) as template:
        yield template


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_same_text_as_transformers(name: str) -> None:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    judge = PreTrainedTokenizerFast(tokenizer_object=fake_tokenizer.sentencepiece(), **names)
    with closing(ChatTemplate(TEMPLATES[name], names)) as template:
        for messages in CONVERSATIONS:
            for add in (True, False):
                expected = judge.apply_chat_template(
                    messages, chat_template=TEMPLATES[name], tokenize=False,
                    add_generation_prompt=add)
                assert template.render(messages, add_generation_prompt=add) == expected


def refused(source: str, match: str, messages: list[dict[str, str]] = HI) -> None:
    """Twice, because the process that ran into a bound must have been replaced."""
    with closing(ChatTemplate(source)) as template:
        for _ in range(2):
            with pytest.raises(UserError, match=match):
                template.render(messages)


def test_what_a_template_refuses_is_told() -> None:
    refused(LLAMA2, "refuses the conversation: Conversation roles must alternate", [ASSISTANT])


@pytest.mark.parametrize(("source", "match"), [
    ("{% for", "broken: line 1"), ("{{ x | nonsense }}", "broken: line 1.*nonsense"),
    ("{{ messages.a.b }}", "failed: .*no attribute 'a'"), ("{{ 1 + 'a' }}", "failed"),
    ("{{ messages.__class__.__mro__ }}", "failed.*unsafe"),
    ("{{ messages.append(1) }}", "failed.*unsafe"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "failed.*recursion"),
    ("{% set n = namespace(__class__=1) %}", "failed.*namespace"),
    ("{% set n = namespace() %}{% set n._x = 1 %}", "failed.*namespace"),
    ("{% include 'secrets' %}", "failed"),
])
def test_broken_templates(source: str, match: str) -> None:
    refused(source, match)


@pytest.mark.parametrize(("source", "match"), [
    ("{{ 'a' * 500000000 }}", "more than 256 MiB"),
    ("{% set x = messages[0]['content'] * 500000000 %}", "more than 256 MiB"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
     r"more than 0.5 s"),
    ("{{ 9 ** (9 ** 9) }}", r"more than 0.5 s"),
    ("{{ 'a' * 2000000 }}", "too much text"),
    ("{% for i in range(99999) %}{{ 'abcdefghijklmnop' }}{% endfor %}", "too much text"),
])
def test_bounds(source: str, match: str) -> None:
    refused(source, match)


def test_huge_sources_are_refused() -> None:
    with pytest.raises(UserError, match="more than 1048576 characters"):
        ChatTemplate("a" * (1 << 20 | 1))


def test_a_killed_process_is_replaced() -> None:
    with closing(ChatTemplate(CHATML)) as template:
        first = template.render(HI)
        for _ in range(2):
            template._child.kill()
            template._child.wait()
            assert template.render(HI) == first
        template.close()
        assert template.render(HI) == first


def test_process_inherits_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with closing(ChatTemplate(CHATML)) as template:
        template.render(HI)
        environment = Path(f"/proc/{template._child.pid}/environ").read_bytes()
        assert b"hf_secret" not in environment
        assert os.environ["HF_TOKEN"] == "hf_secret"


def test_many_threads(chatml: ChatTemplate) -> None:
    results: dict[int, str] = {}

    def work(n: int) -> None:
        for _ in range(20):
            results[n] = chatml.render([{"role": "user", "content": f"number {n}"}])
            assert f"number {n}<" in results[n]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8


def test_text_parts_are_joined(chatml: ChatTemplate) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "user\na\nb<|im_end|>" in chatml.render([{"role": "user", "content": parts}])


def test_large_conversations_fit(chatml: ChatTemplate) -> None:
    text = "你😀" * 500_000
    assert text in chatml.render([{"role": "user", "content": text}])


@pytest.mark.parametrize(("messages", "match"), [
    ([], "conversation is empty"), ("hi", "must be a list"), (None, "must be a list"),
    ([1], r"messages\[0\] must be an object"), (HI + [{"content": "x"}], r"messages\[1\].role"),
    ([{"role": "tool", "content": "x"}], "tools are not supported"),
    ([{"role": ["user"], "content": "x"}], "role must be one of"),
    ([{"role": "user"}], r"content must be text"),
    ([{"role": "user", "content": None}], r"content must be text"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "text parts only"),
    ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "text parts only"),
    (HI * (MAX_MESSAGES + 1), "1025 messages, but at most 1024"),
    ([{"role": "user", "content": "a" * (MAX_CHARS + 1)}], "more than 4194304 characters"),
])
def test_bad_messages(messages: object, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        check_messages(messages)
    assert caught.value.field == "messages"


def template_of(folder: Path) -> str | ChatFormat | None:
    return ChatTemplate.from_folder(folder).source


def test_where_templates_are_found(tmp_path: Path) -> None:
    fake_tokenizer.save(fake_tokenizer.sentencepiece(), tmp_path, bos_token={"content": "<s>"})
    assert template_of(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "list"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert template_of(tmp_path) == "list"
    config.write_text(json.dumps({"chat_template": "plain"}))
    assert template_of(tmp_path) == "plain"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert template_of(tmp_path) == "json"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file")
    assert template_of(tmp_path) == "{{ bos_token }}file"
    config.write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    with closing(ChatTemplate.from_folder(tmp_path)) as template:
        assert template.render(HI) == "<s>file"
    config.write_text(json.dumps({"chat_template": 5}))
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").unlink()
    with pytest.raises(UserError, match="is not text"):
        template_of(tmp_path)


def test_without_a_template(tmp_path: Path) -> None:
    """ChatML if the vocabulary speaks it; otherwise an error once somebody chats."""
    fake_tokenizer.save(fake_tokenizer.byte_level(), tmp_path)
    assert template_of(tmp_path) == FORMATS["chatml"]
    fake_tokenizer.save(fake_tokenizer.sentencepiece(), tmp_path)
    template = ChatTemplate.from_folder(tmp_path)
    with pytest.raises(UserError, match="no chat template.*/v1/completions"):
        template.render(HI)


def test_a_begun_reply_stands_behind_the_prompt_that_it_was_written_for(tmp_path: Path) -> None:
    fake_tokenizer.save(fake_tokenizer.byte_level(), tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    begun = {"role": "assistant", "content": "hello <|im_end|> wor", "prefix": True}
    with closing(ChatTemplate(CHATML)) as template:
        prompt = template.encode(HI, tokenizer)
        ids = template.encode([*HI, begun], tokenizer)
        assert ids[:len(prompt)] == prompt
        assert tokenizer.decode(ids[len(prompt):]) == begun["content"]  # all of it is text
        assert not tokenizer.special_ids & set(ids[len(prompt):])
        with pytest.raises(UserError, match="conversation is empty"):
            template.encode([begun], tokenizer)
        for wrong in ({**begun, "role": "user"}, {**begun, "content": ""}):
            with pytest.raises(UserError, match="can be continued"):
                template.encode([*HI, wrong], tokenizer)
