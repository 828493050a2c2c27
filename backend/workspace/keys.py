"""Keys of settings' files, once: what each is, what it may be, and what it does here.

KEYS are those of a workspace's config.ini, ENGINE_KEYS those of the file that keeps what is set for
a plain folder: EngineConfig's fields by their own names.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from backend.config import EngineConfig, base_type, parse_bool
from backend.errors import UserError


@dataclass(frozen=True)
class Key:
    """One key of a settings' file.

    Attributes:
        kind: "model" and "weights": what the weights decide, so nobody may change it; "engine":
            a setting of EngineConfig; "legacy": kept, and without effect.
        type: int, float, str or bool. config.ini's switches are 0 and 1, as LMDeploy has them.
        help: for people.
        fields: of EngineConfig that the key speaks of. A flag for any of them wins over the key.
        default: what `convert` writes; None where that depends on the model. A legacy key's is
            LMDeploy's.
    """

    name: str
    kind: str
    type: type
    help: str
    fields: tuple[str, ...] = ()
    default: Any = None
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] = ()
    file: str = "config.ini"  # for messages

    @property
    def locked(self) -> bool:
        return self.kind in ("model", "weights")

    def parse(self, text: str) -> Any:
        """The value that `text` is.

        Raises:
            UserError: it is of another type, or out of bounds.
        """
        value: Any = text
        try:
            if self.type is not str:
                value = parse_bool(text) if self.type is bool else self.type(text)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError
        except (ValueError, argparse.ArgumentTypeError):
            what = {int: "a whole number", float: "a number", bool: "true or false"}[self.type]
            raise self.refusal(f"must be {what}", text) from None
        if self.choices and value not in self.choices:
            raise self.refusal(f"must be one of {', '.join(map(str, self.choices))}", text)
        low, high = self.low, self.high
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            raise self.refusal(f"must be {bounds}", text)
        return value

    @property
    def is_switch(self) -> bool:
        """Whether it is on or off."""
        return self.type is bool or self.choices == SWITCH

    def refusal(self, rule: str, text: str) -> UserError:
        """`text` does not keep to `rule`."""
        return UserError(f"{self.file}: {self.name} {rule}, not {text!r:.80}.", field=self.name)

    def show(self, value: Any) -> str:
        """As the file spells it."""
        if self.type is bool:
            return "true" if value else "false"
        return str(int(value)) if isinstance(value, bool) else str(value)


SWITCH = (0, 1)
KV = ("quant_policy", "kv_cache_dtype")
POOL = ("cache_max_entry_count", "kv_cache_gb", "kv_cache_tokens")
STEP = ("max_prefill_token_num",)
KEYS: dict[str, Key] = {
    key.name: key
    for key in (
        Key("model_name", "model", str, "its name in the API, and of its chat template"),
        Key("tensor_para_size", "weights", int, "GPUs that the weights are parted for", ("tp",)),
        Key("head_num", "model", int, "attention heads"),
        Key("kv_head_num", "model", int, "heads of K and V"),
        Key("vocab_size", "model", int, "tokens in the vocabulary"),
        Key("num_layer", "model", int, "decoder layers"),
        Key("inter_size", "model", int, "inner size of the MLP"),
        Key("norm_eps", "model", float, "epsilon of the norms"),
        Key("attn_bias", "model", int, "1: attention has biases"),
        Key("start_id", "model", int, "id of the token that begins a text; -1: none"),
        Key("end_id", "model", int, "id of the token that ends a reply; -1: none"),
        Key("session_len", "engine", int, "longest conversation in tokens, reply included",
            ("session_len",), low=16),
        Key("weight_type", "weights", str, "fp32, fp16, bf16, int8 or int4"),
        Key("rotary_embedding", "model", int, "elements of a head that are rotated"),
        Key("rope_theta", "model", float, "base of the rotation"),
        Key("size_per_head", "model", int, "elements of a head"),
        Key("group_size", "weights", int, "weights that share a scale, where they have 4 bits"),
        Key("max_batch_size", "engine", int, "sequences that run at the same time",
            ("max_batch_size",), 128, 1, 4096),
        Key("max_context_token_num", "engine", int,
            "prompt tokens that one step computes; up to max_batch_size it counts session_lens, "
            "so that 1 is a whole conversation", STEP, 2048, 1),
        Key("step_length", "legacy", int, "tokens a decoding step; is 1", default=1),
        Key("cache_max_entry_count", "engine", float,
            "KV cache: below 1 a share of the memory that is free once the weights are loaded, "
            "from 1 a number of blocks", POOL, 0.8, 0.001),
        Key("cache_block_seq_len", "engine", int, "tokens in one KV block",
            ("cache_block_seq_len",), 64, choices=(8, 16, 32, 64, 128, 256)),
        Key("cache_chunk_size", "legacy", int,
            "blocks allocated at a time; the whole pool is allocated at the start", default=-1),
        Key("num_tokens_per_iter", "engine", int,
            "prompt tokens that one step computes; 0 does as max_context_token_num says", STEP, 0,
            0),
        Key("max_prefill_iters", "legacy", int, "steps that a prompt is spread over", default=1),
        Key("extra_tokens_per_iter", "legacy", int, "slack to end a prompt's last step", default=0),
        Key("use_context_fmha", "legacy", int, "fused attention of prompts; it always is",
            default=1),
        Key("quant_policy", "engine", int, "KV cache: 0 in 16 bits, 4 or 8 in int8", KV, 0,
            choices=(0, 4, 8)),
        Key("kv_cache_dtype", "engine", str,
            "KV cache by name; auto does as quant_policy says", KV, "auto",
            choices=("auto", "int8", "int4")),
        Key("max_position_embeddings", "model", int, "tokens that the model was trained for"),
        Key("rope_scaling_factor", "engine", float,
            "from 1: dynamic NTK by a text's length, for texts longer than the model was trained "
            "for (Qwen: with its own formula, whatever the factor); below 1: none",
            ("rope_scaling_factor",), None, 0, 1000),
        Key("use_logn_attn", "engine", int,
            "1: scale queries beyond the trained length by the logarithm of their position",
            ("use_logn_attn",), None, choices=SWITCH),
    )
}  # fmt: skip


def _engine_keys() -> dict[str, Key]:
    hints = typing.get_type_hints(EngineConfig)
    keys = {}
    for f in fields(EngineConfig):
        if f.metadata["positional"]:
            continue
        kind, _ = base_type(hints[f.name])
        # One flag of a group speaks for all of it, and the field's own is named first.
        group = next((group for group in (KV, POOL) if f.name in group), ())
        names = (f.name, *(name for name in group if name != f.name))
        meta = f.metadata
        keys[f.name] = Key(
            f.name, "engine", kind, meta["help"], names, f.default, meta["low"], meta["high"],
            meta["choices"] or (), "settings",
        )  # fmt: skip
    return keys


ENGINE_KEYS = _engine_keys()


def known_key(name: str, keys: Mapping[str, Key] = KEYS) -> Key:
    """The key called `name`.

    Raises:
        UserError: there is none; names the nearest.
    """
    if name not in keys:
        near = difflib.get_close_matches(name, keys, 1)
        raise UserError(
            f"There is no key {name!r:.80}.",
            f"Did you mean {near[0]}?" if near else "`config show` lists them all.",
            field=name,
        )
    return keys[name]


PAGES = {
    "en": (
        "config_ini.md",
        """# config.ini

[中文](config_ini.zh.md)

Every key of a workspace's config.ini, section `[llama]`, made from
`backend/workspace/keys.py` by `make docs`. A setting may be left out; then its default
counts. A flag wins over the file. See [workspaces](workspace.md).
""",
        "| key | kind | allowed | what `convert` writes | meaning | flags that win over it |",
        {"model": "fixed by the model", "weights": "fixed by the weights", "engine": "setting",
         "legacy": "without effect"},
        "from {}", "from {} to {}",
    ),
    "zh-CN": (
        "config_ini.zh.md",
        """# config.ini

[English](config_ini.md)

workspace 的 config.ini（`[llama]` 一节）的全部键，由 `make docs` 根据
`backend/workspace/keys.py` 生成。设置可以省略，此时用默认值；命令行参数优先于文件。
见 [workspace](workspace.zh.md)。
""",
        "| 键 | 种类 | 可选值 | `convert` 写入的值 | 含义 | 优先于它的参数 |",
        {"model": "由模型决定", "weights": "由权重决定", "engine": "设置", "legacy": "不起作用"},
        "不小于 {}", "{} 到 {}",
    ),
}  # fmt: skip


def write_pages(docs: Path, locales: Path) -> None:
    """docs/config_ini.md and its Chinese twin: every key, as the table has it.

    Args:
        locales: has the keys' help in other languages, as the Config tab shows it.
    """
    for language, (file, opening, header, kinds, at_least, between) in PAGES.items():
        texts = json.loads((locales / language / "config.json").read_text(encoding="utf-8"))
        lines = [opening, header, "|---|---|---|---|---|---|"]
        for key in KEYS.values():
            help = key.help if language == "en" else texts[f"help.ini.{key.name}"]
            allowed = ", ".join(map(str, key.choices))
            if key.low is not None:
                allowed = (at_least if key.high is None else between).format(key.low, key.high)
            flags = ", ".join(
                f"`--{name.replace('_', '-')}`" for name in key.fields if not key.locked)
            default = "" if key.default is None else key.default
            lines.append(
                f"| `{key.name}` | {kinds[key.kind]} | {allowed} | {default} | {help} | {flags} |")
        (docs / file).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    ROOT = Path(__file__).resolve().parents[2]
    write_pages(ROOT / "docs", ROOT / "assets" / "locales")
