"""InternLM3 (InternLM team 2025): Llama again, names included, with bias flags of its own."""

from __future__ import annotations

from dataclasses import replace

from backend.models.decoder import Decoder
from backend.models.model_config import ConfigFields, ModelConfig


class InternLM3ForCausalLM(Decoder):
    """`qkv_bias` is of Q, K and V, `bias` of all other linears; published models have neither."""

    model_type = "internlm3"

    @classmethod
    def configure(cls, config: ModelConfig, fields: ConfigFields) -> ModelConfig:
        bias = fields.boolean("bias", False)
        qkv_bias = fields.boolean("qkv_bias", False)
        return replace(config, qkv_bias=qkv_bias, output_bias=bias, mlp_bias=bias)
