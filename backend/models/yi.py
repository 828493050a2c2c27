"""Yi (01.AI 2023) as it was first published: Llama under a name of its own. Later it is Llama."""

from __future__ import annotations

from backend.models.layout import Layout
from backend.models.llama import LlamaForCausalLM


class YiForCausalLM(LlamaForCausalLM):
    """Its norms are called ln1 and ln2."""

    model_type = "Yi"
    layout = Layout(
        {
            "model.layers.*.ln1": "model.layers.*.input_layernorm",
            "model.layers.*.ln2": "model.layers.*.post_attention_layernorm",
        }
    )
