"""The one decoder: a pre-norm transformer with rotary positions and a gated MLP.

A family (llama.py, qwen2.py, ...) is a subclass that sets flags, names its checkpoints' tensors
where they have other names than Llama's, and overrides a block only where its mathematics differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from backend.layers.attention import Attention, BatchLayout
from backend.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from backend.layers.linear import (
    BuildContext,
    LinearLayer,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    kv_heads_per_rank,
)
from backend.layers.linear_method import WeightSlot
from backend.layers.norm import RMSNorm
from backend.layers.rotary import RotaryEmbedding, Rotation
from backend.models.layout import LLAMA, Layout
from backend.models.model_config import ConfigFields, ModelConfig
from kernels.ops import KVCache


class SelfAttention(nn.Module):
    """Q, K, V; rotation; attention over the KV pools; output projection."""

    def __init__(
        self, config: ModelConfig, index: int, prefix: str, context: BuildContext
    ) -> None:
        super().__init__()
        parallel = context.parallel
        self.head_dim = config.head_dim
        self.num_heads = parallel.divide(config.num_heads, "attention heads")
        self.num_kv_heads = kv_heads_per_rank(config.num_kv_heads, parallel)
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            (f"{prefix}.q_proj", f"{prefix}.k_proj", f"{prefix}.v_proj"),
            config.qkv_bias,
            context,
        )
        self.o_proj = RowParallelLinear(
            config.num_heads * config.head_dim,
            config.hidden_size,
            f"{prefix}.o_proj",
            config.output_bias,
            context,
        )
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            eps = config.rms_norm_eps
            self.q_norm = RMSNorm(config.head_dim, eps, f"{prefix}.q_norm", context)
            self.k_norm = RMSNorm(config.head_dim, eps, f"{prefix}.k_norm", context)
        self.attention = Attention(config.head_dim**-0.5, config.windows[index])

    def forward(
        self,
        hidden: Tensor,
        rotation: Rotation,
        kv_cache: KVCache,
        metadata: BatchLayout,
    ) -> Tensor:
        """hidden [T, hidden_size] -> [T, hidden_size]."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = self.qkv_proj(hidden).unflatten(-1, (heads + 2 * kv_heads, self.head_dim))
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)  # [T, heads, head_dim] each
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin, query_scale = rotation
        if query_scale is not None:
            q = q * query_scale
        return self.o_proj(self.attention(q, k, v, cos, sin, kv_cache, metadata).flatten(1))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU, Shazeer 2020)."""

    def __init__(self, config: ModelConfig, prefix: str, context: BuildContext) -> None:
        super().__init__()
        size = config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [(f"{prefix}.gate_proj", size), (f"{prefix}.up_proj", size)],
            config.mlp_bias,
            context,
        )
        self.down_proj = RowParallelLinear(
            size, config.hidden_size, f"{prefix}.down_proj", config.mlp_bias, context
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [T, hidden_size] -> [T, hidden_size]."""
        return self.down_proj(self.gate_up_proj.gated(hidden))


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm. The residual travels beside the hidden states."""

    def __init__(self, config: ModelConfig, index: int, context: BuildContext) -> None:
        super().__init__()
        prefix, eps = f"model.layers.{index}", config.rms_norm_eps
        size = config.hidden_size
        self.input_layernorm = RMSNorm(size, eps, f"{prefix}.input_layernorm", context)
        self.self_attn = SelfAttention(config, index, f"{prefix}.self_attn", context)
        self.post_attention_layernorm = RMSNorm(
            size, eps, f"{prefix}.post_attention_layernorm", context
        )
        self.mlp = MLP(config, f"{prefix}.mlp", context)

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        rotation: Rotation,
        kv_cache: KVCache,
        metadata: BatchLayout,
    ) -> tuple[Tensor, Tensor]:
        """(this layer's MLP output, the residual that it must still be added to)."""
        if residual is None:
            hidden, residual = self.input_layernorm(hidden), hidden
        else:
            hidden, residual = self.input_layernorm.add(hidden, residual)
        hidden = self.self_attn(hidden, rotation, kv_cache, metadata)
        hidden, residual = self.post_attention_layernorm.add(hidden, residual)
        return self.mlp(hidden), residual


@dataclass(frozen=True)
class ScaleGroup:
    """Linears whose input channels may be multiplied by s if what makes them is divided by s.

    Attributes:
        name: of the targets within the decoder layer, such as "self_attn.qkv_proj".
        source: what makes the channels. Channel c is row `rows.start + c` of its weight
            (RMSNorm: [hidden_size], a linear: [out_features, in_features]), and of its bias.
        rows: these rows; a norm's are all.
        targets: the linears that read the channels, and nothing else does.
    """

    name: str
    source: RMSNorm | LinearLayer
    rows: slice
    targets: tuple[LinearLayer, ...]


def scale_groups(layer: DecoderLayer) -> list[ScaleGroup]:
    """What smooths what in a layer on one rank, in the order of computation.

    The output projection is smoothed by V's rows only if each query head has a KV head of its
    own; otherwise several of its channels come from one row.
    """
    attention, mlp = layer.self_attn, layer.mlp
    qkv, gate_up = attention.qkv_proj, mlp.gate_up_proj
    hidden = slice(0, qkv.in_features)
    groups = [ScaleGroup("self_attn.qkv_proj", layer.input_layernorm, hidden, (qkv,))]
    if attention.num_heads == attention.num_kv_heads:
        v_rows = slice(qkv.out_features - qkv.parts[2].length, qkv.out_features)
        groups.append(ScaleGroup("self_attn.o_proj", qkv, v_rows, (attention.o_proj,)))
    up_rows = slice(gate_up.parts[0].length, gate_up.out_features)
    return [
        *groups,
        ScaleGroup("mlp.gate_up_proj", layer.post_attention_layernorm, hidden, (gate_up,)),
        ScaleGroup("mlp.down_proj", gate_up, up_rows, (mlp.down_proj,)),
    ]


class Decoder(nn.Module):
    """Token ids to logits, one rank's share. Weights are uninitialised until a loader fills them.

    All ranks call `forward` and `compute_logits` together. Call under torch.inference_mode.

    Args:
        session_len: longest sequence that will be run.

    Attributes:
        config: of the whole model.
        num_heads: on this rank.
        num_kv_heads: on this rank, which is how many the KV pools have.
    """

    model_type: ClassVar[str]  # as config.json has it
    # If config.json has none; None means hidden_size / num_attention_heads.
    default_head_dim: ClassVar[int | None] = None
    # Keys of config.json that are the family's own: usual key -> the family's.
    spellings: ClassVar[Mapping[str, str]] = {}
    layout: ClassVar[Layout] = LLAMA

    def __init__(self, config: ModelConfig, session_len: int, context: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.num_kv_heads = kv_heads_per_rank(config.num_kv_heads, context.parallel)
        self.num_heads = context.parallel.divide(config.num_heads, "attention heads")
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, "model.embed_tokens", context
        )
        self.rotary = RotaryEmbedding(
            config.rope, config.head_dim, config.max_position_embeddings, session_len,
            context.device, context.dtype if config.use_logn_attn else None,
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, index, context) for index in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, "model.norm", context)
        table = self.embed_tokens
        if not config.tie_word_embeddings:
            table = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, "lm_head", context
            )
        self.lm_head = ParallelLMHead(table, context, config.normalized_head)

    @classmethod
    def configure(cls, config: ModelConfig, fields: ConfigFields) -> ModelConfig:
        """The family's own reading of config.json, on top of the common keys."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv_caches: list[KVCache],
        metadata: BatchLayout,
        rope_steps: Tensor | int = 0,
    ) -> Tensor:
        """Run the new tokens of all sequences, writing their K and V into the pools.

        Args:
            input_ids: int64 [T].
            positions: int64 [T], each token's place in its sequence.
            kv_caches: each layer's pool, of `num_kv_heads` heads.
            metadata: where the tokens lie, or who takes the attentions (`AttentionCall`) over.
            rope_steps: `rotary.step_of` each token's sequence, int64 [T], or one for all.

        Returns:
            Hidden states after the last norm, [T, hidden_size].
        """
        hidden = self.embed_tokens(input_ids)
        residual: Tensor | None = None
        rotation = self.rotary(positions, rope_steps)
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            hidden, residual = layer(hidden, residual, rotation, kv_cache, metadata)
        assert residual is not None  # num_layers >= 1
        return self.norm.add(hidden, residual)[0]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Chosen rows of `forward`'s result [rows, hidden_size] -> float32 [rows, vocab_size]."""
        return self.lm_head(hidden)

    def weight_slots(self) -> dict[str, WeightSlot]:
        """Where each tensor of a checkpoint goes, by the name that Llama's have."""
        slots: dict[str, WeightSlot] = {}
        for module in self.modules():
            if isinstance(module, (LinearLayer, RMSNorm, VocabParallelEmbedding)):
                slots.update(module.weight_slots())
        return slots

    def process_weights_after_loading(self) -> None:
        """Call once, when every slot is filled."""
        for module in list(self.modules()):
            if isinstance(module, (LinearLayer, ParallelLMHead)):
                module.process_weights_after_loading()

    def weight_bytes(self) -> int:
        """Bytes of this rank's parameters."""
        unique: dict[int, torch.Tensor] = {id(p): p for p in self.parameters()}
        return sum(p.numel() * p.element_size() for p in unique.values())
