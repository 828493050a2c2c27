"""Llama 2 and 3 (Touvron et al. 2023; Llama team 2024), and the many models of their shape."""

from __future__ import annotations

from dataclasses import replace

from backend.models.decoder import Decoder
from backend.models.model_config import ConfigFields, ModelConfig


class LlamaForCausalLM(Decoder):
    """Biases only where config.json asks for them; the output projection follows Q, K and V."""

    model_type = "llama"

    @classmethod
    def configure(cls, config: ModelConfig, fields: ConfigFields) -> ModelConfig:
        bias = fields.boolean("attention_bias", False)
        mlp_bias = fields.boolean("mlp_bias", False)
        return replace(config, qkv_bias=bias, output_bias=bias, mlp_bias=mlp_bias)
