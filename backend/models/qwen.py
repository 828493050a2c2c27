"""Qwen, the first (Bai et al. 2023): Llama with Q, K and V biases, under GPT-2's names."""

from __future__ import annotations

from dataclasses import replace

from backend.errors import UserError
from backend.layers.rotary import QWEN_DYNAMIC
from backend.models.decoder import Decoder
from backend.models.layout import Layout
from backend.models.model_config import ConfigFields, ModelConfig


class QWenLMHeadModel(Decoder):
    """The MLP's gate is w2, and `intermediate_size` counts gate and up together.

    `seq_length` is what the model was trained for; `use_dynamic_ntk` and `use_logn_attn` say what
    it does beyond.
    """

    model_type = "qwen"
    spellings = {
        "hidden_size": "n_embd",  # the first four only in the first release
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "ffn_hidden_size",
        "max_position_embeddings": "seq_length",
        "head_dim": "kv_channels",
        "rms_norm_eps": "layer_norm_epsilon",
        "rope_theta": "rotary_emb_base",
        "partial_rotary_factor": "rotary_pct",
    }
    layout = Layout(
        {
            "transformer.wte": "model.embed_tokens",
            "transformer.h.*.ln_1": "model.layers.*.input_layernorm",
            "transformer.h.*.attn.c_proj": "model.layers.*.self_attn.o_proj",
            "transformer.h.*.ln_2": "model.layers.*.post_attention_layernorm",
            "transformer.h.*.mlp.w2": "model.layers.*.mlp.gate_proj",
            "transformer.h.*.mlp.w1": "model.layers.*.mlp.up_proj",
            "transformer.h.*.mlp.c_proj": "model.layers.*.mlp.down_proj",
            "transformer.ln_f": "model.norm",
        },
        qkv="transformer.h.*.attn.c_attn",
    )

    @classmethod
    def configure(cls, config: ModelConfig, fields: ConfigFields) -> ModelConfig:
        if config.intermediate_size % 2:
            raise UserError(
                f"config.json: intermediate_size {config.intermediate_size} must be even: it "
                "counts the MLP's gate and up together."
            )
        if not fields.boolean("scale_attn_weights", True):
            raise UserError("config.json: scale_attn_weights false is not supported.")
        bias = not fields.boolean("no_bias", True)  # c_attn has one always
        stretches = fields.boolean("use_dynamic_ntk", True)
        said = config.quantization or fields.raw.get("dtype") or fields.raw.get("torch_dtype")
        return replace(
            config,
            intermediate_size=config.intermediate_size // 2,
            qkv_bias=True,
            output_bias=bias,
            mlp_bias=bias,
            dtype=config.dtype if said else "bfloat16",  # as all are published; few say so
            use_logn_attn=fields.boolean("use_logn_attn", True),
            dynamic_ntk=QWEN_DYNAMIC,
            rope=replace(config.rope, rope_type=QWEN_DYNAMIC) if stretches else config.rope,
        )
