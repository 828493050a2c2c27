"""Which architectures there are. A new family is a file beside this one and a line here."""

from __future__ import annotations

from dataclasses import replace

from backend.errors import UserError
from backend.models.baichuan import BaiChuanForCausalLM, BaichuanForCausalLM
from backend.models.decoder import Decoder
from backend.models.internlm import InternLMForCausalLM
from backend.models.internlm2 import InternLM2ForCausalLM
from backend.models.internlm3 import InternLM3ForCausalLM
from backend.models.llama import LlamaForCausalLM
from backend.models.mistral import MistralForCausalLM
from backend.models.model_config import ConfigFields, ModelConfig, parse_common, read_config_fields
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


def read_model_config(folder: str) -> ModelConfig:
    """ModelConfig of the checkpoint in `folder`.

    Raises:
        UserError: if the folder is no model's, or the model is not supported.
    """
    return parse_config(read_config_fields(folder))
