"""Qwen3 (Yang et al. 2025): RMSNorm on each head's q and k, and no biases by default."""

from __future__ import annotations

from dataclasses import replace

from backend.models.decoder import Decoder
from backend.models.model_config import ConfigFields, ModelConfig, qwen_windows


class Qwen3ForCausalLM(Decoder):
    """head_dim is free of hidden_size / num_heads."""

    model_type = "qwen3"
    default_head_dim = 128

    @classmethod
    def configure(cls, config: ModelConfig, fields: ConfigFields) -> ModelConfig:
        bias = fields.boolean("attention_bias", False)
        return replace(
            config,
            qk_norm=True,
            qkv_bias=bias,
            output_bias=bias,
            windows=qwen_windows(config, fields),
        )
