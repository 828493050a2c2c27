"""InternLM 7B and 20B (InternLM team 2023): Llama, with attention biases in the 7B."""

from __future__ import annotations

from dataclasses import replace

from backend.errors import UserError
from backend.layers.rotary import RopeParameters
from backend.models.decoder import Decoder
from backend.models.model_config import ConfigFields, ModelConfig


class InternLMForCausalLM(Decoder):
    """`bias` is of Q, K, V and the output projection; `rotary` says how positions stretch."""

    model_type = "internlm"

    @classmethod
    def configure(cls, config: ModelConfig, fields: ConfigFields) -> ModelConfig:
        bias = fields.boolean("bias", True)
        rotary = fields.section("rotary")
        rope = config.rope if rotary is None else _rope(rotary)
        return replace(config, qkv_bias=bias, output_bias=bias, rope=rope)


def _rope(rotary: ConfigFields) -> RopeParameters:
    """{"type": "dynamic" or "origin", "base": theta, "scaling_factor": 1.0 if missing}."""
    kind, base = rotary.text("type", "dynamic"), rotary.number("base", 10000.0, low=1.0)
    if kind == "origin":
        return RopeParameters(rope_theta=base)
    if kind != "dynamic":
        raise UserError(
            f"{rotary.where}: the type {kind!r:.40} is unknown.", "Known: dynamic, origin."
        )
    return RopeParameters("dynamic", base, factor=rotary.number("scaling_factor", 1.0))
