"""Prompts of the families, character by character as they document them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backend import chat_formats
from backend.chat_formats import FORMATS, INTERNLM_META, VICUNA_META, ChatFormat, named
from backend.chat_template import ChatTemplate
from backend.errors import UserError
from backend.tokenizer import Tokenizer
from tests import fake_tokenizer

SYSTEM = {"role": "system", "content": "Be kind."}
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Who?"}]

# Name -> (first question, system prompt and two turns). The sources are in docs/chat_templates.md.
CHATML_TALK = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n")
CHATML_SYSTEM = "<|im_start|>system\nBe kind.<|im_end|>\n"
CHATML_HI = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
LLAMA3_TALK = (
    "Be kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n")
LLAMA3_HI = (
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n")
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
LLAMA3_SYSTEM = "<s><|start_header_id|>system<|end_header_id|>\n\n"
PROMPTS = {
    "chatml": (CHATML_HI, CHATML_SYSTEM + CHATML_TALK),
    "internlm-chat-7b": (
        f"<s><|System|>:{INTERNLM_META}\n<|User|>:Hi\n<|Bot|>:",
        "<s><|System|>:Be kind.\n<|User|>:Hi\n<|Bot|>:Hello!<eoa>\n<|User|>:Who?\n<|Bot|>:"),
    "internlm2-chat-7b": (
        f"<s><|im_start|>system\n{INTERNLM_META}<|im_end|>\n{CHATML_HI}",
        "<s>" + CHATML_SYSTEM + CHATML_TALK),
    "internlm3": ("<s>" + CHATML_HI, "<s>" + CHATML_SYSTEM + CHATML_TALK),
    "llama2": (
        "<s>[INST] Hi [/INST]",
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Hello! </s><s>[INST] Who? [/INST]"),
    "codellama": (
        "<s>[INST] Hi [/INST]",
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Hello! </s><s>[INST] Who? [/INST]"),
    "llama3": ("<s>" + LLAMA3_HI, LLAMA3_SYSTEM + LLAMA3_TALK),
    "llama3_1": (
        f"{LLAMA3_SYSTEM}{DATES}<|eot_id|>{LLAMA3_HI}", f"{LLAMA3_SYSTEM}{DATES}{LLAMA3_TALK}"),
    "vicuna": (
        f"<s>{VICUNA_META} USER: Hi ASSISTANT:",
        "<s>Be kind. USER: Hi ASSISTANT: Hello!</s>USER: Who? ASSISTANT:"),
    "yi": (CHATML_HI, CHATML_SYSTEM + CHATML_TALK),
    "baichuan2": (
        "<reserved_106>Hi<reserved_107>",
        "Be kind.<reserved_106>Hi<reserved_107>Hello!<reserved_106>Who?<reserved_107>"),
    "baichuan-chat": (
        "<reserved_102>Hi<reserved_103>",
        "Be kind.<reserved_102>Hi<reserved_103>Hello!<reserved_102>Who?<reserved_103>"),
    "qwen": (
        f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{CHATML_HI}",
        CHATML_SYSTEM + CHATML_TALK),
    "qwen2_5": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        f"<|im_end|>\n{CHATML_HI}", CHATML_SYSTEM + CHATML_TALK),
    "qwen3": (CHATML_HI, CHATML_SYSTEM + CHATML_TALK),
    "mistral": (
        "<s>[INST] Hi [/INST]",
        "<s>[INST] Be kind.\n\nHi [/INST] Hello!</s>[INST] Who? [/INST]"),
    "deepseek": (
        "<s>User: Hi\n\nAssistant:",
        "<s>Be kind.\n\nUser: Hi\n\nAssistant: Hello!<｜end▁of▁sentence｜>"
        "User: Who?\n\nAssistant:"),
    "solar": (
        "<s>### User:\nHi\n\n### Assistant:\n",
        "<s>### System:\nBe kind.\n\n### User:\nHi\n\n### Assistant:\nHello!\n\n"
        "### User:\nWho?\n\n### Assistant:\n"),
    "ultralm": (
        f"<s>User: {chat_formats.ULTRA_META}</s>\nUser: Hi</s>\nAssistant:",
        "<s>User: Be kind.</s>\nUser: Hi</s>\nAssistant: Hello!</s>\nUser: Who?</s>\nAssistant:"),
    "base": ("<s>Hi", "<s>Be kind.HiHello!Who?"),
}


@pytest.mark.parametrize("name", list(PROMPTS))
def test_prompts_of_the_families(name: str) -> None:
    first, talk = PROMPTS[name]
    template = ChatTemplate(named(name), {"bos_token": "<s>"})
    assert template.render(TALK[:1]) == first
    assert template.render([SYSTEM, *TALK]) == talk


def test_every_format_has_a_prompt_here_and_every_name_leads_to_one() -> None:
    assert {id(named(name)) for name in PROMPTS} == {id(f) for f in FORMATS.values()}
    names = chat_formats.names()
    assert names == sorted(set(names))
    assert all(isinstance(named(name), ChatFormat) for name in names)
    for typed in ("internlm-chat-7b", "internlm-chat-20b", "internlm2-chat-7b", "internlm2",
                  "llama2", "llama3", "vicuna", "yi", "baichuan2-7b", "qwen-7b", "codellama",
                  "mistral", "deepseek", "chatml", "base"):
        assert chat_formats.is_known(typed)


@pytest.mark.parametrize("page", ["chat_templates.md", "chat_templates.zh.md"])
def test_every_name_is_in_the_docs(page: str) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / page).read_text("utf-8")
    assert not [name for name in chat_formats.names() if f"`{name}`" not in page]


def test_a_conversation_that_is_not_continued() -> None:
    text = named("llama2").render(TALK[:2], "<s>", generate=False)
    assert text == "<s>[INST] Hi [/INST] Hello! </s>"
    with pytest.raises(UserError, match="no chat template called 'lama2'") as caught:
        named("lama2")
    assert "Did you mean llama2?" in str(caught.value)


def test_filling_in() -> None:
    """Code Llama's form: <PRE> {prefix} <SUF>{suffix} <MID>."""
    fill = ChatFormat(capability="infilling")
    message = {"role": "user", "content": "def f(x):<FILL>\n    return y"}
    assert fill.render([message], "<s>") == "<s><PRE> def f(x): <SUF>\n    return y <MID>"
    with pytest.raises(UserError, match="must have <FILL> once"):
        fill.render(TALK[:1])


def declare(folder: Path, **config: object) -> object:
    (folder / "config.json").write_text(json.dumps(config))
    return ChatTemplate.from_folder(folder).source


def test_the_declared_family_decides_and_never_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "internlm2-chat-7b"
    folder.mkdir()
    fake_tokenizer.save(fake_tokenizer.sentencepiece(), folder)
    assert declare(folder, architectures=["LlamaForCausalLM"]) is None
    assert declare(folder, architectures=["InternLMForCausalLM"]) == FORMATS["internlm-chat"]
    assert declare(folder, architectures=[], model_type="qwen") == FORMATS["qwen-chat"]
    assert declare(folder, architectures="x", model_type=["y"]) is None
    (folder / "added_tokens.json").write_text('{"<|start_header_id|>": 7}')
    assert declare(folder, architectures=["LlamaForCausalLM"]) == FORMATS["llama3"]
    own = {"chat_template": "own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    assert declare(folder, architectures=["InternLMForCausalLM"]) == "own"


def test_a_choice_wins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fake_tokenizer.save_chatml(tmp_path)
    assert ChatTemplate.from_folder(tmp_path, "llama-2-chat").source == FORMATS["llama2"]
    assert "takes the place of the model's own" in caplog.text
    jinja = tmp_path / "mine.jinja"
    jinja.write_text("{{ messages }}")
    assert ChatTemplate.from_folder(tmp_path, str(jinja)).source == "{{ messages }}"
    for gone in ("gone.jinja", "gone.json"):
        with pytest.raises(UserError, match="There is no file"):
            ChatTemplate.from_folder(tmp_path, str(tmp_path / gone))
    with pytest.raises(UserError, match="no chat template called 'mine'"):
        ChatTemplate.from_folder(tmp_path, "mine")
    assert chat_formats.template_choice("", "internlm2-chat-7b") == "internlm2-chat-7b"
    assert chat_formats.template_choice("vicuna", "internlm2-chat-7b") == "vicuna"
    assert chat_formats.template_choice("", "my-own-name") == ""
    assert chat_formats.template_choice("", None) == ""


def from_json(folder: Path, **values: object) -> ChatFormat:
    (folder / "t.json").write_text(json.dumps(values))
    return chat_formats.from_json(folder / "t.json")


def test_lmdeploys_json(tmp_path: Path) -> None:
    """The example of LMDeploy's documentation: a format of one's own."""
    own = from_json(
        tmp_path, model_name="your awesome chat template name", system="<|im_start|>system\n",
        meta_instruction="You are a robot developed by LMDeploy.", eosys="<|im_end|>\n",
        user="<|im_start|>user\n", eoh="<|im_end|>\n", assistant="<|im_start|>assistant\n",
        eoa="<|im_end|>", separator="\n", capability="chat", stop_words=["<|im_end|>"])
    robot = "<|im_start|>system\nYou are a robot developed by LMDeploy.<|im_end|>\n"
    assert own.render(TALK, "<s>") == f"<s>{robot}{CHATML_TALK}"
    assert own.stop_words == ("<|im_end|>",)


def test_json_that_changes_a_known_format(tmp_path: Path) -> None:
    pirate = from_json(tmp_path, model_name="llama2", meta_instruction="Arr.", eosys=None)
    assert pirate.render(TALK[:1]) == "[INST] <<SYS>>\nArr.\n<</SYS>>\n\nHi [/INST]"
    assistant = from_json(tmp_path, model_name="vicuna", assistant="BOT: ", bos=False)
    assert assistant.render([SYSTEM, TALK[0]], "<s>") == "Be kind. USER: Hi BOT: "
    assert from_json(tmp_path, capability="completion").render(TALK) == "HiHello!Who?"


@pytest.mark.parametrize(("values", "match"), [
    ({"asistant": "x"}, "'asistant' is no part.*Did you mean assistant"),
    ({"user": 5}, "user must be text"), ({"stop_words": "x"}, "must be a list"),
    ({"stop_words": [1]}, "must be a list"), ({"bos": "yes"}, "bos must be true or false"),
    ({"capability": "dance"}, "capability must be one of"), ({"control_tokens": {}}, "no part"),
])
def test_json_with_mistakes(values: dict[str, object], match: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=match):
        from_json(tmp_path, **values)


def test_stop_words_are_tokens_or_texts(tmp_path: Path) -> None:
    fake_tokenizer.save_chatml(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    both = ChatTemplate(ChatFormat(stop_words=("<|im_end|>", "###", "a")))
    assert both.stops(tokenizer) == ([2], ["###", "a"])
    assert ChatTemplate("{{ '<|im_end|>' }} <|eot_id|>").stops(tokenizer) == ([2], [])
    assert ChatTemplate(None).stops(tokenizer) == ([], [])
