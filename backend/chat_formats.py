"""Chat formats of the model families, by name: for checkpoints that come without a template.

A format says what stands around each turn. Names and fields are LMDeploy's, so that what its users
typed (`--model-name internlm2-chat-7b`) and wrote (chat_template.json) works here; the texts are
those that the families themselves document. docs/chat_templates.md shows them.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from backend.errors import UserError
from backend.model_files import read_json, read_text

CAPABILITIES = ("chat", "completion", "infilling", "python")
FILL = "<FILL>"  # where the model is to write, in a message to a model that fills in
FILE_TYPES = (".json", ".jinja")
# Tokens by which chat templates end a turn. Some models list only their end-of-text token.
END_OF_TURN_TOKENS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<eoa>")
HINT = "python app.py list prints all names; a .json or .jinja file is another way."


@dataclass(frozen=True)
class ChatFormat:
    """What stands around the turns of a conversation.

    {bos}{system}{meta_instruction}{eosys}{user}QUESTION{eoh}{assistant}ANSWER{eoa}{separator}...

    Attributes:
        system, eosys: around a system prompt.
        meta_instruction: the system prompt of a conversation that has none; None for no prompt.
        user, eoh: around what the user says.
        assistant, eoa: around what the model says.
        separator: after an answer, if the conversation goes on.
        user_after_system: instead of `user` for the first turn after a system prompt, where the
            prompt is part of that turn; None for the same as `user`.
        reply: instead of `assistant` where the model is to go on: a header that ends with a blank
            goes without it, as the model writes the blank itself; None for the same.
        bos: begin with the model's begin-of-text token.
        trim: take blanks off both ends of every message.
        capability: "chat"; "completion" and "python" pass the messages on as they are; "infilling"
            puts the text around "<FILL>" into Code Llama's form for it.
        stop_words: texts or tokens that end a reply, besides those that the checkpoint names.
        control_tokens: tokens of the family that its tokenizer's files do not always list as such,
            by the piece of the vocabulary that they are.
    """

    system: str = ""
    meta_instruction: str | None = None
    eosys: str = ""
    user: str = ""
    eoh: str = ""
    assistant: str = ""
    eoa: str = ""
    separator: str = ""
    user_after_system: str | None = None
    reply: str | None = None
    bos: bool = True
    trim: bool = False
    capability: str = "chat"
    stop_words: tuple[str, ...] = ()
    control_tokens: dict[str, str] = field(default_factory=dict)

    def render(
        self, messages: Sequence[dict[str, str]], bos_token: str = "", generate: bool = True
    ) -> str:
        """The conversation as text, up to where the reply begins if `generate`.

        Raises:
            UserError: a message to fill in does not say where.
        """
        begin = bos_token if self.bos else ""
        if self.capability != "chat":
            text = "".join(message["content"] for message in messages)
            return begin + (_infilling(text) if self.capability == "infilling" else text)
        turns = [(m["role"], m["content"].strip() if self.trim else m["content"]) for m in messages]
        if self.meta_instruction is not None and turns[0][0] != "system":
            turns.insert(0, ("system", self.meta_instruction))
        pieces, before = [begin], ""
        for role, content in turns:
            pieces += [self.separator if before == "assistant" else ""]
            pieces += [self._header(role, before), content, self._end(role)]
            before = role
        if generate:
            pieces += [self.separator if before == "assistant" else ""]
            pieces += [self.assistant if self.reply is None else self.reply]
        return "".join(pieces)

    def _header(self, role: str, before: str) -> str:
        if role == "user" and before == "system" and self.user_after_system is not None:
            return self.user_after_system
        return {"system": self.system, "user": self.user, "assistant": self.assistant}[role]

    def _end(self, role: str) -> str:
        return {"system": self.eosys, "user": self.eoh, "assistant": self.eoa}[role]


def _infilling(text: str) -> str:
    """Code Llama's prompt for the text that belongs between two others."""
    if text.count(FILL) != 1:
        raise UserError(f"A text to fill in must have {FILL} once.", field="messages")
    prefix, suffix = text.split(FILL)
    return f"<PRE> {prefix} <SUF>{suffix} <MID>"


INTERNLM_META = (
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI "
    "Laboratory (上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the "
    "user such as English and 中文."
)
VICUNA_META = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
ULTRA_META = (
    "A one-turn chat between a curious user and an artificial intelligence assistant. The "
    "assistant gives helpful, very detailed, and polite answers to the user's questions."
)
CHATML = ChatFormat(
    system="<|im_start|>system\n", eosys="<|im_end|>\n",
    user="<|im_start|>user\n", eoh="<|im_end|>\n",
    assistant="<|im_start|>assistant\n", eoa="<|im_end|>", separator="\n",
    bos=False, stop_words=("<|im_end|>",),
)
# InternLM2's first files have its tokens under their numbers only.
INTERNLM2_TOKENS = {
    "<|im_start|>": "[UNUSED_TOKEN_146]", "<|im_end|>": "[UNUSED_TOKEN_145]",
    "<|action_start|>": "[UNUSED_TOKEN_144]", "<|action_end|>": "[UNUSED_TOKEN_143]",
    "<|interpreter|>": "[UNUSED_TOKEN_142]", "<|plugin|>": "[UNUSED_TOKEN_141]",
}
LLAMA2 = ChatFormat(
    system="[INST] <<SYS>>\n", eosys="\n<</SYS>>\n\n", user="[INST] ", user_after_system="",
    eoh=" [/INST]", assistant=" ", reply="", eoa=" </s>", separator="<s>", trim=True,
    stop_words=("</s>",),
)
LLAMA3 = ChatFormat(
    system="<|start_header_id|>system<|end_header_id|>\n\n", eosys="<|eot_id|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n", eoh="<|eot_id|>",
    assistant="<|start_header_id|>assistant<|end_header_id|>\n\n", eoa="<|eot_id|>",
    trim=True, stop_words=("<|eot_id|>", "<|end_of_text|>"),
)
FORMATS: dict[str, ChatFormat] = {
    "base": ChatFormat(capability="completion"),
    "chatml": CHATML,
    "internlm-chat": ChatFormat(
        system="<|System|>:", meta_instruction=INTERNLM_META, eosys="\n",
        user="<|User|>:", eoh="\n", assistant="<|Bot|>:", eoa="<eoa>", separator="\n",
        stop_words=("<eoa>",), control_tokens={"<eoh>": "<eoh>", "<eoa>": "<eoa>"}),
    "internlm2-chat": replace(
        CHATML, meta_instruction=INTERNLM_META, bos=True, control_tokens=INTERNLM2_TOKENS,
        stop_words=("<|im_end|>", "<|action_end|>")),
    "internlm3": replace(CHATML, bos=True),
    "llama2": LLAMA2,
    "codellama": replace(LLAMA2, stop_words=("</s>", "<EOT>")),
    "llama3": LLAMA3,
    "llama3_1": replace(
        LLAMA3, meta_instruction="", stop_words=("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
        system=f"{LLAMA3.system}Cutting Knowledge Date: December 2023\n"
               "Today Date: 26 Jul 2024\n\n"),
    "vicuna": ChatFormat(
        meta_instruction=VICUNA_META, eosys=" ", user="USER: ", eoh=" ", assistant="ASSISTANT: ",
        reply="ASSISTANT:", eoa="</s>", stop_words=("</s>",)),
    "yi": replace(CHATML, stop_words=("<|im_end|>", "<|endoftext|>")),
    "baichuan-chat": ChatFormat(
        user="<reserved_102>", assistant="<reserved_103>", bos=False, stop_words=("</s>",),
        control_tokens={t: t for t in ("<reserved_102>", "<reserved_103>")}),
    "baichuan2-chat": ChatFormat(
        user="<reserved_106>", assistant="<reserved_107>", bos=False, stop_words=("</s>",),
        control_tokens={t: t for t in ("<reserved_106>", "<reserved_107>")}),
    "qwen-chat": replace(
        CHATML, meta_instruction="You are a helpful assistant.",
        stop_words=("<|im_end|>", "<|endoftext|>")),
    "qwen2_5": replace(
        CHATML, stop_words=("<|im_end|>", "<|endoftext|>"),
        meta_instruction="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3": replace(CHATML, stop_words=("<|im_end|>", "<|endoftext|>")),
    "mistral-instruct": ChatFormat(
        system="[INST] ", eosys="\n\n", user="[INST] ", user_after_system="", eoh=" [/INST]",
        assistant=" ", reply="", eoa="</s>", stop_words=("</s>",)),
    "deepseek-chat": ChatFormat(
        eosys="\n\n", user="User: ", eoh="\n\n", assistant="Assistant: ", reply="Assistant:",
        eoa="<｜end▁of▁sentence｜>", stop_words=("<｜end▁of▁sentence｜>",)),
    "solar": ChatFormat(
        system="### System:\n", eosys="\n\n", user="### User:\n", eoh="\n\n",
        assistant="### Assistant:\n", eoa="\n\n", stop_words=("</s>",)),
    "ultralm": ChatFormat(
        system="User: ", meta_instruction=ULTRA_META, eosys="</s>\n", user="User: ",
        eoh="</s>\n", assistant="Assistant: ", reply="Assistant:", eoa="</s>", separator="\n",
        stop_words=("</s>",)),
}
ALIASES: dict[str, tuple[str, ...]] = {
    "base": ("internlm", "llama", "internlm-20b", "internlm2", "internlm2-1_8b", "internlm2-7b",
             "internlm2-20b", "baichuan-7b", "baichuan-base"),
    "internlm-chat": ("internlm-chat-7b", "internlm-chat-7b-8k", "internlm-chat-8k",
                      "internlm-chat-20b"),
    "internlm2-chat": ("internlm2-chat-1_8b", "internlm2-chat-7b", "internlm2-chat-20b",
                       "internlm2_5"),
    "llama2": ("llama-2", "llama-2-chat"),
    "llama3_1": ("llama3_2",),
    "vicuna": ("wizardlm",),
    "yi": ("yi-chat", "yi-200k", "yi-34b"),
    "baichuan2-chat": ("baichuan2", "baichuan2-7b"),
    "qwen-chat": ("qwen", "qwen-7b", "qwen-14b", "qwen1_5", "qwen2"),
    "qwen2_5": ("qwen2d5",),
    "mistral-instruct": ("mistral", "mixtral-instruct"),
    "deepseek-chat": ("deepseek",),
    "solar": ("solar-70b",),
    "ultralm": ("ultracm",),
}
_CANONICAL = {alias: name for name, aliases in ALIASES.items() for alias in aliases}

# Of config.json. Architectures whose checkpoints always bring a template are not here.
BY_ARCHITECTURE = {
    "InternLMForCausalLM": "internlm-chat", "InternLM2ForCausalLM": "internlm2-chat",
    "InternLM3ForCausalLM": "internlm3", "BaichuanForCausalLM": "baichuan2-chat",
    "BaiChuanForCausalLM": "baichuan2-chat", "QWenLMHeadModel": "qwen-chat",
    "YiForCausalLM": "yi",
}
BY_MODEL_TYPE = {
    "internlm": "internlm-chat", "internlm2": "internlm2-chat", "internlm3": "internlm3",
    "baichuan": "baichuan2-chat", "qwen": "qwen-chat", "Yi": "yi",
}
# A family by a token that its files list, where the architecture is many families'.
BY_TOKEN = {"<|im_start|>": "chatml", "<|start_header_id|>": "llama3"}
TOKEN_FILES = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")


def names() -> list[str]:
    """Every name of a format, the other names of one included, sorted."""
    return sorted({*FORMATS, *_CANONICAL})


def is_known(name: str) -> bool:
    """Whether `name` is one of `names()`."""
    return name in FORMATS or name in _CANONICAL


def named(name: str) -> ChatFormat:
    """The format called `name`.

    Raises:
        UserError: there is none; names the nearest.
    """
    if not is_known(name):
        near = difflib.get_close_matches(name, names(), 1)
        raise UserError(
            f"There is no chat template called {name!r:.80}.",
            (f"Did you mean {near[0]}? " if near else "") + HINT, field="chat_template")
    return FORMATS[_CANONICAL.get(name, name)]


def template_choice(chat_template: str, model_name: str | None) -> str:
    """What `ChatTemplate.from_folder` is to take: the template that is asked for, else the format
    that the model is called by, as in LMDeploy; "" leaves it to the checkpoint."""
    if chat_template:
        return chat_template
    return model_name if model_name and is_known(model_name) else ""


def declared(folder: Path) -> ChatFormat | None:
    """The format of the family that a model's config.json declares, or that its tokens show.

    What the folder is called does not matter. None if it may be any of several, or a base model.
    """
    config = read_json(folder / "config.json")
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    for key, known in ((first, BY_ARCHITECTURE), (config.get("model_type"), BY_MODEL_TYPE)):
        if isinstance(key, str) and key in known:
            return FORMATS[known[key]]
    for token, name in BY_TOKEN.items():
        if any(_lists(folder / file, token) for file in TOKEN_FILES):
            return FORMATS[name]
    return None


def end_of_turn(source: str) -> list[str]:
    """The tokens that end a turn in a chat template's Jinja."""
    return [token for token in END_OF_TURN_TOKENS if token in source]


def _lists(path: Path, token: str) -> bool:
    try:
        return path.is_file() and json.dumps(token).encode() in path.read_bytes()
    except OSError:
        return False


def from_json(path: Path) -> ChatFormat:
    """A format in LMDeploy's JSON form: `model_name`, and what differs from the format so called.

    A name that is not known stands for a format with nothing around the turns.

    Raises:
        UserError: no such file, no JSON object, an unknown key or a value of the wrong kind.
    """
    if read_text(path) is None:
        raise UserError(f"There is no file {path}.", HINT, field="chat_template")
    data = {key: value for key, value in read_json(path).items() if value is not None}
    name = data.pop("model_name", "")
    allowed = [f.name for f in fields(ChatFormat) if f.name != "control_tokens"]
    for key, value in data.items():
        _check(path, key, value, allowed)
    base = FORMATS[_CANONICAL.get(name, name)] if isinstance(name, str) and is_known(
        name) else ChatFormat()
    # What belongs to a part that is replaced must not outlive it.
    stale = {"assistant": "reply", "system": "user_after_system"}
    reset = {stale[key]: None for key in data if key in stale}
    if "stop_words" in data:
        data["stop_words"] = tuple(data["stop_words"])
    return replace(base, **{**reset, **data})


def _check(path: Path, key: str, value: Any, allowed: list[str]) -> None:
    def wrong(what: str) -> UserError:
        return UserError(f"{path}: {what}.", field="chat_template")

    if key not in allowed:
        near = difflib.get_close_matches(key, allowed, 1)
        raise UserError(
            f"{path}: {key!r:.60} is no part of a chat template.",
            f"Did you mean {near[0]}?" if near else f"It has: {', '.join(allowed)}.",
            field="chat_template")
    if key in ("bos", "trim"):
        if not isinstance(value, bool):
            raise wrong(f"{key} must be true or false")
    elif key == "stop_words":
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise wrong("stop_words must be a list of texts")
    elif not isinstance(value, str):
        raise wrong(f"{key} must be text")
    elif key == "capability" and value not in CAPABILITIES:
        raise wrong(f"capability must be one of {', '.join(CAPABILITIES)}")
