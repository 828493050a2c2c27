"""Mistral 7B (Jiang et al. 2023): Llama with a sliding window on every layer."""

from __future__ import annotations

from dataclasses import replace

from backend.models.decoder import Decoder
from backend.models.model_config import ConfigFields, ModelConfig


class MistralForCausalLM(Decoder):
    """`sliding_window: null` (v0.2 on) means none; a missing key means 4096, as in transformers."""

    model_type = "mistral"

    @classmethod
    def configure(cls, config: ModelConfig, fields: ConfigFields) -> ModelConfig:
        window = None
        if fields.raw.get("sliding_window", 4096) is not None:
            window = fields.integer("sliding_window", 4096, high=1 << 30)
        return replace(config, windows=(window,) * config.num_layers)
