"""Qwen2 and Qwen2.5 (Yang et al. 2024): biases on Q, K and V, always and only there."""

from __future__ import annotations

from dataclasses import replace

from backend.models.decoder import Decoder
from backend.models.model_config import ConfigFields, ModelConfig, qwen_windows


class Qwen2ForCausalLM(Decoder):
    """Llama with Q, K and V biases and, if the config turns them on, windows in upper layers."""

    model_type = "qwen2"

    @classmethod
    def configure(cls, config: ModelConfig, fields: ConfigFields) -> ModelConfig:
        return replace(config, qkv_bias=True, windows=qwen_windows(config, fields))
