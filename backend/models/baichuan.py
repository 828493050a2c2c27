"""Baichuan 2 7B (Yang et al. 2023) and Baichuan 7B: Llama, with Q, K and V in one tensor."""

from __future__ import annotations

from dataclasses import replace

from backend.errors import UserError
from backend.models.decoder import Decoder
from backend.models.layout import Layout
from backend.models.model_config import ConfigFields, ModelConfig


class BaichuanForCausalLM(Decoder):
    """Baichuan 2 7B, whose output head is normalised.

    The 13B models go by the same name; they encode positions by ALiBi, and so have no
    max_position_embeddings.
    """

    model_type = "baichuan"
    spellings = {"max_position_embeddings": "model_max_length"}
    layout = Layout(qkv="model.layers.*.self_attn.W_pack")

    @classmethod
    def configure(cls, config: ModelConfig, fields: ConfigFields) -> ModelConfig:
        if fields.given.get("max_position_embeddings") is None:
            raise UserError(
                "This is a Baichuan 13B, which encodes positions by ALiBi; that is not supported.",
                "Baichuan 2 7B is.",
                field="model",
            )
        return replace(config, normalized_head=True)


class BaiChuanForCausalLM(Decoder):
    """Baichuan 7B, the first. Only a capital letter tells its name from the second's."""

    model_type = "baichuan"
    layout = BaichuanForCausalLM.layout

    @classmethod
    def configure(cls, config: ModelConfig, fields: ConfigFields) -> ModelConfig:
        return config
