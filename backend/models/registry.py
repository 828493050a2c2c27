"""Which architectures there are. A new family is a file beside this one and a line here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from backend.errors import UserError
from backend.models.baichuan import BaiChuanForCausalLM, BaichuanForCausalLM
from backend.models.checkpoint import read_checkpoint
from backend.models.decoder import Decoder
from backend.models.internlm import InternLMForCausalLM
from backend.models.internlm2 import InternLM2ForCausalLM
from backend.models.internlm3 import InternLM3ForCausalLM
from backend.models.llama import LlamaForCausalLM
from backend.models.long_context import LongContext
from backend.models.mistral import MistralForCausalLM
from backend.models.model_config import (
    QUANTIZATION_KEYS,
    ConfigFields,
    ModelConfig,
    parse_common,
    read_config_fields,
)
from backend.models.qwen import QWenLMHeadModel
from backend.models.qwen2 import Qwen2ForCausalLM
from backend.models.qwen3 import Qwen3ForCausalLM
from backend.models.yi import YiForCausalLM

FAMILIES: dict[str, type[Decoder]] = {
    family.__name__: family
    for family in (
        LlamaForCausalLM,
        MistralForCausalLM,
        Qwen2ForCausalLM,
        Qwen3ForCausalLM,
        InternLMForCausalLM,
        InternLM2ForCausalLM,
        InternLM3ForCausalLM,
        BaichuanForCausalLM,
        BaiChuanForCausalLM,
        QWenLMHeadModel,
        YiForCausalLM,
    )
}
# Without architectures in config.json, its model_type decides: the first that has it.
BY_MODEL_TYPE = {family.model_type: name for name, family in reversed(FAMILIES.items())}


def family_of(architecture: str) -> type[Decoder]:
    """The decoder class of an architecture as config.json names it.

    Raises:
        UserError: listing those that are known.
    """
    if architecture not in FAMILIES:
        raise UserError(
            f"The architecture {architecture!r:.80} is not supported.",
            f"Supported: {', '.join(FAMILIES)}.",
        )
    return FAMILIES[architecture]


def parse_config(fields: ConfigFields) -> ModelConfig:
    """A config.json's fields as its family understands them.

    Raises:
        UserError: if something is unknown, missing or out of range.
    """
    architecture = _architecture(fields)
    family = family_of(architecture)
    fields = fields.spelled(family.spellings)
    config = parse_common(fields, architecture, family.default_head_dim)
    config = family.configure(config, fields)
    if config.quantization is None:
        return config
    kept = config.quantization.not_converted
    kept += tuple(name for entry in kept for name in family.layout.decoder_names(entry))
    return replace(config, quantization=replace(config.quantization, not_converted=kept))


def _architecture(fields: ConfigFields) -> str:
    """The first of `architectures`; if there are none, the one that `model_type` stands for."""
    architectures = fields.raw.get("architectures")
    if isinstance(architectures, list) and architectures:
        if not isinstance(architectures[0], str):
            raise UserError(
                f"config.json: architectures[0] must be text, not {architectures[0]!r}."
            )
        return architectures[0]
    model_type = fields.raw.get("model_type")
    if isinstance(model_type, str) and model_type in BY_MODEL_TYPE:
        return BY_MODEL_TYPE[model_type]
    raise UserError(
        "config.json names no architecture.",
        f"It needs \"architectures\" with one of: {', '.join(FAMILIES)}.",
    )


def read_model_config(folder: str, long_context: LongContext | None = None) -> ModelConfig:
    """ModelConfig of the checkpoint in `folder`, with `long_context` if that is given.

    Raises:
        UserError: if the folder is no model's, or the model is not supported.
    """
    fields = read_config_fields(folder)
    if not any(fields.raw.get(key) for key in QUANTIZATION_KEYS):
        found = quantization_of(folder)
        if found is not None:
            fields = ConfigFields({**fields.raw, QUANTIZATION_KEYS[0]: found}, fields.where)
    config = parse_config(fields)
    return config if long_context is None else long_context.applied(config)


def quantization_of(folder: str) -> dict[str, Any] | None:
    """A `quantization_config` by the tensors alone: LMDeploy 0.2 wrote none, only such tensors."""
    try:
        tensors = read_checkpoint(folder)
    except UserError:
        return None  # told when the weights are wanted
    for name, info in tensors.items():
        prefix, _, kind = name.rpartition(".")
        if kind == "weight" and info.dtype == "I8" and f"{prefix}.scale" in tensors:
            return {"quant_method": "smooth_quant"}
        scales = tensors.get(f"{prefix}.scales")
        if kind != "qweight" or scales is None or not len(info.shape) == len(scales.shape) == 2:
            continue
        (inputs, words), (groups, outputs) = info.shape, scales.shape
        if groups and inputs % groups == 0 and outputs == 8 * words:  # GPTQ packs the inputs
            return {"quant_method": "awq", "bits": 4, "group_size": inputs // groups}
    return None
