"""config.json of a checkpoint, read as data: known keys, checked; the rest is ignored.

Nothing that a checkpoint says is run: `auto_map` and .py files beside it have no meaning here.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backend.errors import UserError
from backend.layers.rotary import RopeParameters, check_rope
from backend.workspace.layout import text_folder

MAX_CONFIG_BYTES = 16 << 20
QUANTIZATION_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class QuantizationConfig:
    """How the decoder's linear layers are stored; embeddings, norms and output head never are so.

    Attributes:
        method: "awq", 4-bit weights in groups, or "smooth_quant", weights and tokens of 8 bits.
        group_size: of "awq", inputs that share a scale and a zero: 32, 64 or 128. Else 0.
        not_converted: modules that stayed in 16 bit, by (parts of) their names.
    """

    method: str
    group_size: int
    not_converted: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """What a Decoder is built from. Counts are of the whole model, not of one rank."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int  # tokens that the model was trained for
    rms_norm_eps: float
    rope: RopeParameters
    tie_word_embeddings: bool
    dtype: str  # of the checkpoint: float32, bfloat16 or float16
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each head's q and k before the rotation
    windows: tuple[int | None, ...] = ()  # a layer's sliding window in tokens; None sees all
    normalized_head: bool = False  # each row of the output head is divided by its L2 norm
    use_logn_attn: bool = False  # queries beyond max_position_embeddings are scaled by its log
    dynamic_ntk: str = "dynamic"  # rope type that dynamic NTK is in this family
    quantization: QuantizationConfig | None = None

    def __post_init__(self) -> None:
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)


class ConfigFields:
    """Typed, bounded access to the keys of a config.json. Every method raises UserError.

    Args:
        raw: the JSON object.
        where: what messages call it.
        spellings: usual key -> the one that this family's files have for it, which wins.

    Attributes:
        given: the JSON object as it is.
        raw: the same, with the usual keys beside the family's.
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        where: str = "config.json",
        spellings: Mapping[str, str] | None = None,
    ) -> None:
        own = {usual: key for usual, key in (spellings or {}).items() if key in raw}
        self.given = raw
        self.raw = {**raw, **{usual: raw[key] for usual, key in own.items()}}
        self.where = where
        self._own = own

    def spelled(self, spellings: Mapping[str, str]) -> ConfigFields:
        """The same for a family with keys of its own, see `spellings` above."""
        return ConfigFields(self.raw, self.where, spellings)

    def place(self, key: str) -> str:
        """Where a value stands, for a message: the file, and the key as the file spells it."""
        return f"{self.where}: {self._own.get(key, key)}"

    def _value(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise UserError(
                f"{self.place(key)} is missing.", "Download the model's config.json again."
            )
        return value

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int) -> int:
        """A whole number from low to high. Without a default the key must be there."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise UserError(
                f"{self.place(key)} must be a whole number from {low} to {high}, not {value!r}."
            )
        return value

    def number(self, key: str, default: float | None = None, *, low: float = 0.0) -> float:
        """A finite number above low."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{self.place(key)} must be a number, not {value!r}.")
        if not math.isfinite(value) or value <= low:
            raise UserError(f"{self.place(key)} must be finite and above {low}, not {value!r}.")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """The same, or None if the key is missing or null."""
        return None if self.raw.get(key) is None else self.number(key)

    def boolean(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.place(key)} must be true or false, not {value!r}.")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise UserError(f"{self.place(key)} must be text, not {value!r}.")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers above 0; empty if the key is missing."""
        value = self.raw.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or len(value) > 4096:
            raise UserError(f"{self.place(key)} must be a list of numbers, not {value!r:.80}.")
        items = ConfigFields({f"{key}[{i}]": item for i, item in enumerate(value)}, self.where)
        return tuple(items.number(name) for name in items.raw)

    def section(self, key: str) -> ConfigFields | None:
        """An object inside; None if the key is missing or null."""
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise UserError(f"{self.place(key)} must be an object, not {value!r:.80}.")
        return ConfigFields(value, f"{self.where}: {key}")


def read_json_object(path: str, max_bytes: int) -> dict[str, Any]:
    """The JSON object in a regular file.

    Raises:
        UserError: if it is missing, no regular file, too large, no JSON or no object.
    """
    name = os.path.basename(path)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would block for ever
            raise UserError(f"{path} is not a regular file.")
        if status.st_size > max_bytes:
            raise UserError(f"{path} has {status.st_size} bytes; no {name} is that large.")
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON: {error}.", f"Download the model's {name} again."
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {value!r:.40}.")
    return value


def read_config_fields(folder: str) -> ConfigFields:
    """config.json of a model's folder, or of a workspace.

    Raises:
        UserError: if the folder is missing or is no model's, or the file is not valid.
    """
    if not os.path.exists(folder):
        raise UserError(
            f"The model folder {folder} does not exist.", "Check the path.", field="model"
        )
    if not os.path.isdir(folder):
        raise UserError(
            f"{folder} is a file, not a model folder.",
            "Give the folder that holds config.json and the weights.",
            field="model",
        )
    path = os.path.join(text_folder(folder), "config.json")
    if not os.path.lexists(path):
        raise UserError(
            f"The folder {folder} is no model: it has no config.json.",
            "Give a folder in Hugging Face layout: config.json, tokenizer and .safetensors files.",
            field="model",
        )
    return ConfigFields(read_json_object(path, MAX_CONFIG_BYTES))


def parse_common(
    fields: ConfigFields, architecture: str, default_head_dim: int | None
) -> ModelConfig:
    """The keys that all families share. Biases, norms and windows are the family's to add.

    Args:
        default_head_dim: if the config has none; None means hidden_size / num_attention_heads.

    Raises:
        UserError: if a key is missing, out of range or asks for something unsupported.
    """
    quantization = parse_quantization(fields)
    hidden_act = fields.text("hidden_act", "silu")
    if hidden_act not in ("silu", "swish"):
        raise UserError(
            f"config.json: hidden_act {hidden_act!r} is not supported.", "Only silu is."
        )
    hidden_size = fields.integer("hidden_size", high=1 << 20)
    num_heads = fields.integer("num_attention_heads", high=1 << 14)
    num_kv_heads = fields.integer("num_key_value_heads", num_heads, high=1 << 14)
    if num_heads % num_kv_heads:
        raise UserError(
            f"config.json: num_attention_heads {num_heads} is no multiple of "
            f"num_key_value_heads {num_kv_heads}."
        )
    if fields.raw.get("head_dim") is None and default_head_dim is None and hidden_size % num_heads:
        raise UserError(
            f"config.json: hidden_size {hidden_size} is no multiple of num_attention_heads "
            f"{num_heads}, and there is no head_dim."
        )
    derived = default_head_dim or hidden_size // num_heads
    head_dim = fields.integer("head_dim", derived, low=2, high=1 << 12)
    if head_dim % 2:
        raise UserError(f"config.json: head_dim {head_dim} must be even for rotary embedding.")
    max_position_embeddings = fields.integer("max_position_embeddings", high=1 << 30)
    # AWQ's scales are float16, so that is what a model that says nothing was computed in; and
    # an int8 one was hardly computed in float32.
    unsaid = "float16" if quantization else "float32"
    dtype = fields.text("dtype", fields.text("torch_dtype", unsaid))
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"config.json: dtype {dtype!r} is not one of float32, bfloat16, float16.")
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size", high=1 << 24),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", high=1 << 22),
        num_layers=fields.integer("num_hidden_layers", high=4096),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=parse_rope(fields, head_dim),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        dtype=dtype,
        quantization=quantization,
    )


def parse_quantization(fields: ConfigFields) -> QuantizationConfig | None:
    """`quantization_config` as AutoAWQ, transformers and LMDeploy write it; None for 16 bits.

    Raises:
        UserError: naming the method or the setting that is not supported.
    """
    sections = (fields.section(key) for key in QUANTIZATION_KEYS)
    section = next((found for found in sections if found is not None and found.raw), None)
    if section is None:
        return None

    def refuse(what: str) -> UserError:
        return UserError(
            f"This checkpoint is quantized with {what}, which is not supported.",
            'Supported: quant_method "awq" with bits 4, group_size 32, 64 or 128, version "gemm" '
            'and zero_point true; quant_method "smooth_quant" with quant_dtype "int8". Or use the '
            "model's float16 or bfloat16 checkpoint.",
        )

    names = section.raw.get("modules_to_not_convert") or []
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise UserError(
            f"{section.where}: modules_to_not_convert must be a list of names, not {names!r:.80}."
        )
    method = section.text("quant_method").lower()
    if method == "smooth_quant":
        number = section.text("quant_dtype", "int8").lower()
        if number != "int8":
            raise refuse(f"quant_dtype {number!r:.40}")
        return QuantizationConfig(method, 0, tuple(names))
    if method != "awq":
        raise refuse(f"the method {method!r:.40}")
    bits = section.integer("bits", low=1, high=64)
    if bits != 4:
        raise refuse(f"bits {bits}")
    group_size = section.integer("group_size", low=-1, high=1 << 20)
    if group_size not in (32, 64, 128):
        raise refuse(f"group_size {group_size}")
    if section.raw.get("backend") == "llm-awq":
        raise refuse("the backend 'llm-awq'")
    # transformers 5 calls it format as well.
    version = section.text("version", section.text("format", "gemm")).lower()
    if version != "gemm":
        raise refuse(f"version {version!r:.40}")
    if not section.boolean("zero_point", True):
        raise refuse("zero_point false")
    return QuantizationConfig(method, group_size, tuple(names))


def parse_rope(fields: ConfigFields, head_dim: int) -> RopeParameters:
    """`rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before).

    Raises:
        UserError: if the type is unknown, or a parameter is missing or out of range.
    """
    section = fields.section("rope_parameters") or fields.section("rope_scaling")
    section = section or ConfigFields({})
    if any(isinstance(value, dict) for value in section.raw.values()):
        raise UserError(f"{section.where} differs by layer, which is not supported.")
    for part in (fields, section):
        if part.number("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(f"{part.place('partial_rotary_factor')} is not supported.")
    # A top-level original length wins over the section's, as in transformers.
    original = next(
        (
            place.integer("original_max_position_embeddings", high=1 << 30)
            for place in (fields, section)
            if place.raw.get("original_max_position_embeddings") is not None
        ),
        None,
    )
    rope = RopeParameters(
        rope_type=section.text("rope_type", section.text("type", "default")),
        rope_theta=section.number("rope_theta", fields.number("rope_theta", 10000.0), low=1.0),
        factor=section.optional_number("factor"),
        original_max_position_embeddings=original,
        low_freq_factor=section.optional_number("low_freq_factor"),
        high_freq_factor=section.optional_number("high_freq_factor"),
        attention_factor=section.optional_number("attention_factor"),
        beta_fast=section.optional_number("beta_fast"),
        beta_slow=section.optional_number("beta_slow"),
        mscale=section.optional_number("mscale"),
        mscale_all_dim=section.optional_number("mscale_all_dim"),
        truncate=section.boolean("truncate", True),
        short_factor=section.numbers("short_factor"),
        long_factor=section.numbers("long_factor"),
    )
    check_rope(rope, head_dim)
    return rope


def qwen_windows(config: ModelConfig, fields: ConfigFields) -> tuple[int | None, ...]:
    """Qwen's rule: with use_sliding_window, layers from max_window_layers on have the window.

    `layer_types`, where a config has it, says the same layer by layer and wins.
    """
    if not fields.boolean("use_sliding_window", False) or fields.raw.get("sliding_window") is None:
        return (None,) * config.num_layers
    window = fields.integer("sliding_window", high=1 << 30)
    types = fields.raw.get("layer_types")
    if types is None:
        first = fields.integer("max_window_layers", 28, low=0, high=4096)
        return tuple(window if i >= first else None for i in range(config.num_layers))
    known = {"sliding_attention": window, "full_attention": None}
    if not isinstance(types, list) or len(types) != config.num_layers or any(
        not isinstance(kind, str) or kind not in known for kind in types
    ):
        raise UserError(
            f"config.json: layer_types must name sliding_attention or full_attention for each of "
            f"the {config.num_layers} layers."
        )
    return tuple(known[kind] for kind in types)
