"""Which architectures there are. A new family is a file beside this one and a line here."""

from __future__ import annotations

from backend.errors import UserError
from backend.models.decoder import Decoder
from backend.models.llama import LlamaForCausalLM
from backend.models.mistral import MistralForCausalLM
from backend.models.model_config import ConfigFields, ModelConfig, parse_common, read_config_fields
from backend.models.qwen2 import Qwen2ForCausalLM
from backend.models.qwen3 import Qwen3ForCausalLM

FAMILIES: dict[str, type[Decoder]] = {
    family.__name__: family
    for family in (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
}


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
    architectures = fields.raw.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise UserError(
            "config.json names no architecture.",
            f"It needs \"architectures\" with one of: {', '.join(FAMILIES)}.",
        )
    if not isinstance(architectures[0], str):
        raise UserError(f"config.json: architectures[0] must be text, not {architectures[0]!r}.")
    family = family_of(architectures[0])
    config = parse_common(fields, architectures[0], family.default_head_dim)
    return family.configure(config, fields)


def read_model_config(folder: str) -> ModelConfig:
    """ModelConfig of the checkpoint in `folder`.

    Raises:
        UserError: if the folder is no model's, or the model is not supported.
    """
    return parse_config(read_config_fields(folder))
