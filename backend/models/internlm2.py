"""InternLM2 and InternLM2.5 (Cai et al. 2024): Llama, with Q, K and V in one tensor."""

from __future__ import annotations

from dataclasses import replace

from backend.models.decoder import Decoder
from backend.models.layout import Layout, by_kv_head
from backend.models.model_config import ConfigFields, ModelConfig


class InternLM2ForCausalLM(Decoder):
    """`bias` is of attention's tensors; published models have none."""

    model_type = "internlm2"
    layout = Layout(
        {
            "model.tok_embeddings": "model.embed_tokens",
            "model.layers.*.attention_norm": "model.layers.*.input_layernorm",
            "model.layers.*.attention.wo": "model.layers.*.self_attn.o_proj",
            "model.layers.*.ffn_norm": "model.layers.*.post_attention_layernorm",
            "model.layers.*.feed_forward.w1": "model.layers.*.mlp.gate_proj",
            "model.layers.*.feed_forward.w3": "model.layers.*.mlp.up_proj",
            "model.layers.*.feed_forward.w2": "model.layers.*.mlp.down_proj",
            "output": "lm_head",
        },
        qkv="model.layers.*.attention.wqkv",
        order=by_kv_head,
    )

    @classmethod
    def configure(cls, config: ModelConfig, fields: ConfigFields) -> ModelConfig:
        bias = fields.boolean("bias", False)
        return replace(config, qkv_bias=bias, output_bias=bias)
