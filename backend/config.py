"""Every setting of LMDesk, once: default, help, bounds.

Command line, validation, the page's forms and the docs are projections of these dataclasses;
`tests/unit/test_config.py` compares them. Standard library only, so that every floor may use it.
"""

from __future__ import annotations

import argparse
import logging
import math
import types
import typing
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

from backend.errors import UserError

T = TypeVar("T")
log = logging.getLogger(__name__)

KV_CACHE_BITS = {"int8": 8, "int4": 4}  # of an element, by its name in `kv_cache_dtype`


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] | None = None,
    positional: bool = False,
    factory: Any = MISSING,
) -> Any:
    """A dataclass field with help, inclusive bounds and choices in its metadata."""
    metadata = dict(help=help, low=low, high=high, choices=choices, positional=positional)
    if factory is not MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class EngineConfig:
    """How a model is loaded and run. Fixed for the life of an engine."""

    model: str = option(
        "", "folder of the model, in Hugging Face layout, or of a workspace", positional=True
    )
    dtype: str = option(
        "auto",
        "number format of weights and activations; auto takes the checkpoint's on a GPU, and on "
        "a CPU bfloat16 if it has instructions for it, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = option(
        "auto", "auto takes a GPU if there is one", choices=("auto", "cpu", "cuda")
    )
    tp: int = option(1, "tensor parallel ranks, one process each", low=1, high=64)
    session_len: int | None = option(
        None, "longest conversation in tokens; default: what the model was trained for", low=16
    )
    rope_scaling_factor: float | None = option(
        None,
        "from 1: dynamic NTK, for texts longer than the model was trained for; below 1: none; "
        "default: what config.json says",
        low=0,
        high=1000,
    )
    use_logn_attn: bool | None = option(
        None,
        "scale queries beyond the trained length by the logarithm of their position; default: "
        "what config.json says",
    )
    max_batch_size: int = option(128, "sequences that run at the same time", low=1, high=4096)
    max_prefill_token_num: int = option(
        2048, "tokens one step computes at most; longer prompts go in chunks", low=16, high=1 << 20
    )
    cache_max_entry_count: float = option(
        0.8,
        "KV cache: below 1 a share of the memory that is free once the weights are loaded, from 1 "
        "a number of blocks",
        low=0.001,
    )
    kv_cache_gb: float | None = option(
        None, "KV cache in GB (10^9 bytes) a GPU, instead of cache_max_entry_count", low=0.001
    )
    kv_cache_tokens: int | None = option(
        None, "KV cache in tokens, instead of cache_max_entry_count", low=16
    )
    quant_policy: int = option(
        0,
        "KV cache: 0 in the model's number format, 8 in int8, 4 in int4, scaled by token and head",
        choices=(0, 4, 8),
    )
    kv_cache_dtype: str = option(
        "auto",
        "KV cache by name, instead of quant_policy: int8 or int4; auto does as quant_policy says",
        choices=("auto", *KV_CACHE_BITS),
    )
    cache_block_seq_len: int = option(
        64, "tokens in one KV block, the unit of prefix reuse", choices=(8, 16, 32, 64, 128, 256)
    )
    enable_prefix_caching: bool = option(True, "reuse the KV of prompts' common beginnings")
    kernels: str = option(
        "auto",
        "auto: the device's own; reference: plain torch operations, slow and obvious, to compare "
        "with",
        choices=("auto", "reference"),
    )
    eager_mode: bool = option(False, "on a GPU, no CUDA graphs: slower; starts a little sooner")
    batch_invariant: bool = option(
        False, "the same reply to the bit whatever else runs beside it; slower"
    )

    def __post_init__(self) -> None:
        named = KV_CACHE_BITS.get(self.kv_cache_dtype)
        if named and self.quant_policy not in (0, named):
            raise UserError(
                f"kv_cache_dtype {self.kv_cache_dtype} and quant_policy {self.quant_policy} ask "
                "for different KV caches.",
                "Give only one of them.",
                field="kv_cache_dtype",
            )
        if self.kv_cache_tokens is not None and self.kv_cache_gb is not None:
            raise UserError(
                "kv_cache_tokens and kv_cache_gb are both given.", "Give one.", field="kv_cache_gb"
            )

    @property
    def kv_cache_bits(self) -> int:
        """8 or 4 of an element of the KV cache; 0 means the model's own number format."""
        return KV_CACHE_BITS.get(self.kv_cache_dtype, self.quant_policy)


@dataclass(frozen=True)
class SamplingParams:
    """How one reply is drawn. Token ids only; stop strings belong to the text side."""

    temperature: float = option(0.7, "0 is greedy; higher is more varied", low=0.0, high=2.0)
    top_p: float = option(
        0.8, "keep the likeliest tokens up to this probability", low=0.0, high=1.0
    )
    top_k: int = option(
        0, "keep this many of the likeliest tokens; 0 keeps all", low=0, high=1 << 20
    )
    min_p: float = option(
        0.0, "drop tokens less likely than this times the likeliest", low=0.0, high=1.0
    )
    repetition_penalty: float = option(
        1.0, "above 1 discourages tokens that occurred, prompt included", low=0.01, high=10.0
    )
    presence_penalty: float = option(
        0.0, "above 0 discourages tokens that the reply has used", low=-2.0, high=2.0
    )
    frequency_penalty: float = option(
        0.0, "the same for each time that the reply used it", low=-2.0, high=2.0
    )
    max_tokens: int | None = option(
        None, "longest reply in tokens; default: what the context leaves", low=1
    )
    min_tokens: int = option(0, "shortest reply: no end before this many tokens", low=0)
    seed: int | None = option(None, "same seed, same reply", low=-(1 << 63), high=(1 << 63) - 1)
    ignore_eos: bool = option(False, "go on past the model's end-of-reply token")
    stop_token_ids: tuple[int, ...] = option((), "end the reply at these token ids", low=0)
    logit_bias: dict[int, float] = option(
        None, "token id -> value added to its logit", factory=dict, low=-100.0, high=100.0
    )
    logprobs: int | None = option(
        None, "report log-probabilities, with this many alternatives", low=0, high=20
    )

    def __post_init__(self) -> None:
        validate(self)

    @property
    def reads_reply(self) -> bool:
        """Whether the next token's distribution depends on which tokens the reply has so far."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


@dataclass(frozen=True)
class ServerConfig:
    """Where the server listens and who may use it."""

    server_name: str = option("127.0.0.1", "address to listen on; other than loopback needs a key")
    server_port: int = option(6006, "port to listen on", low=0, high=65535)
    api_keys: tuple[str, ...] = option((), "keys that clients must send; several, by spaces")
    host_keys: tuple[str, ...] = option(
        (), "for a class: keys of its hosts, new makes one; api_keys are students' then, who chat"
    )
    root_path: str = option("", "path prefix when behind a proxy that adds one")
    model_dirs: tuple[str, ...] = option(
        (), "folders whose models the page may load and quantize, by spaces; beside downloaded ones"
    )


@dataclass(frozen=True)
class ChatConfig:
    """What a model is called, and how messages become its prompts."""

    model_name: str | None = option(
        None,
        "name of the model in the API; one of the names that `list` prints chooses that chat "
        "template too; default: its folder's name",
    )
    chat_template: str = option(
        "",
        "a name that `list` prints, or a .json or .jinja file; default: the checkpoint's own, "
        "else that of its architecture",
    )
    meta_instruction: str = option(
        "", "system prompt of conversations that bring none, instead of the template's own"
    )
    cap: str = option(
        "auto",
        "what the model is for: chat; completion and python pass on what is said without a "
        "template, infilling fills in for <FILL>; auto is what its template is for",
        choices=("auto", "chat", "completion", "infilling", "python"),
    )

    def __post_init__(self) -> None:
        if self.meta_instruction and self.cap not in ("auto", "chat"):
            raise UserError(
                f"A system prompt (meta_instruction) has no place in {self.cap}.",
                "Leave one of the two out.",
                field="meta_instruction",
            )


def workspace_kv_cache_dtype(quant_policy: int) -> str:
    """The `kv_cache_dtype` that `quant_policy` of a workspace's config.ini means.

    4 is int8 there, as the tutorials have it (LMDeploy up to 0.3, where it was a bit flag); in
    EngineConfig, and in LMDeploy since 0.4, it is int4.

    Raises:
        UserError: neither 0, 4 nor 8.
    """
    if quant_policy not in (0, 4, 8):
        raise UserError(
            f"quant_policy must be one of 0, 4, 8, not {quant_policy!r:.200}.",
            "In a workspace 4 and 8 are int8; for int4 say kv_cache_dtype = int4.",
            field="quant_policy",
        )
    if quant_policy == 4:
        log.warning("quant_policy 4 of a workspace means int8; for int4 say kv_cache_dtype = int4.")
    return "int8" if quant_policy else "auto"


def base_type(annotation: Any) -> tuple[Any, bool]:
    """(type without None, whether None is allowed) of a field's annotation."""
    if isinstance(annotation, types.UnionType):
        args = [a for a in typing.get_args(annotation) if a is not type(None)]
        return args[0], True
    return annotation, False


def _check_number(name: str, value: Any, kind: type, meta: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{name} must be a number, not {value!r:.200}.", field=name)
    if kind is int and not isinstance(value, int):
        raise UserError(f"{name} must be a whole number, not {value!r:.200}.", field=name)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} must be finite, not {value!r:.200}.", field=name)
    low, high = meta["low"], meta["high"]
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = (
            f"from {low} to {high}"
            if None not in (low, high)
            else (f"at least {low}" if high is None else f"at most {high}")
        )
        raise UserError(f"{name} must be {bounds}, not {value!r:.200}.", field=name)


def validate(config: Any) -> None:
    """Check every field of a config dataclass against its type, bounds and choices.

    Raises:
        UserError: naming the field, what it must be, and what it is.
    """
    hints = typing.get_type_hints(type(config))
    for f in fields(config):
        value, meta = getattr(config, f.name), f.metadata
        kind, optional = base_type(hints[f.name])
        if value is None and optional:
            continue
        if kind in (int, float):
            _check_number(f.name, value, kind, meta)
        elif kind is bool and not isinstance(value, bool):
            raise UserError(f"{f.name} must be true or false, not {value!r:.200}.", field=f.name)
        elif kind is str and not isinstance(value, str):
            raise UserError(f"{f.name} must be text, not {value!r:.200}.", field=f.name)
        elif typing.get_origin(kind) is tuple:
            if not isinstance(value, tuple):
                raise UserError(f"{f.name} must be a list, not {value!r:.200}.", field=f.name)
            if typing.get_args(kind)[0] is int:
                for item in value:
                    _check_number(f.name, item, int, meta)
        elif typing.get_origin(kind) is dict:
            if not isinstance(value, dict):
                raise UserError(f"{f.name} must be an object, not {value!r:.200}.", field=f.name)
            for key, item in value.items():
                if isinstance(key, bool) or not isinstance(key, int) or key < 0:
                    raise UserError(f"{f.name} maps token ids, not {key!r:.200}.", field=f.name)
                _check_number(f.name, item, float, meta)
        if meta["choices"] and value not in meta["choices"]:
            allowed = ", ".join(map(str, meta["choices"]))
            raise UserError(f"{f.name} must be one of {allowed}, not {value!r:.200}.", field=f.name)


def parse_bool(text: str) -> bool:
    """`True`, `false`, `1`, `no` ... as the tutorials' command lines spell it."""
    word = text.strip().lower()
    if word in ("true", "1", "yes", "on"):
        return True
    if word in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"true or false expected, not {text!r}")


def add_arguments(
    parser: argparse._ActionsContainer, cls: type, positionals: bool = True
) -> None:
    """Add one flag (or positional) for every field of `cls` that a command line can spell."""
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        kind, _ = base_type(hints[f.name])
        text = f.metadata["help"].replace("%", "%%")
        if f.metadata["positional"]:
            if not positionals:
                continue
            parser.add_argument(f.name, nargs="?", default=argparse.SUPPRESS, help=text)
            continue
        flag = "--" + f.name.replace("_", "-")
        common: dict[str, Any] = dict(dest=f.name, default=argparse.SUPPRESS)
        if typing.get_origin(kind) is dict:
            continue  # no spelling on a command line
        if typing.get_origin(kind) is tuple:
            common.update(nargs="+", type=typing.get_args(kind)[0])
        elif kind is bool:
            common.update(nargs="?", const=True, type=parse_bool, metavar="true|false")
        elif f.metadata["choices"]:
            common.update(type=kind, choices=f.metadata["choices"])
        else:
            common.update(type=kind, metavar=f.name.upper())
        if f.default not in (None, MISSING, (), ""):
            text += f" (default: {f.default})"
        parser.add_argument(flag, help=text, **common)


def from_namespace(cls: type[T], namespace: argparse.Namespace, **defaults: Any) -> T:
    """Build `cls` from the flags given, then `defaults`, then the fields' own defaults."""
    given = {**defaults}
    for f in fields(cls):  # type: ignore[arg-type]
        if hasattr(namespace, f.name):
            value = getattr(namespace, f.name)
            given[f.name] = tuple(value) if isinstance(value, list) else value
    config = cls(**given)
    validate(config)
    return config
