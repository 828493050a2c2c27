"""A workspace's tensors: LMDeploy's names, each rank's part of a layer stored by itself.

Layer N of rank R, all [out_features, in_features] unless said otherwise:

    layers.N.attention.w_qkv.R.weight        Q, K and V of the rank's heads
    layers.N.attention.wo.R.weight
    layers.N.feed_forward.w1.R.weight        gate; w3 is up, w2 is down
    layers.N.attention.w_qkv.R.qweight       4 bits: int32 [in, out / 8], eight outputs a word in
                                             AutoAWQ's order (see kernels.packing)
    layers.N.attention.w_qkv.R.scales_zeros  float16 [in / group, out, 2]: scale, zero (0 to 15)
    layers.N.feed_forward.w13.R.qweight      gate and up together, where weights have 4 bits

Biases are there as `.bias`, scales of 8-bit weights as `.scale`. Whole, for all ranks:
tok_embeddings.weight, norm.weight, output.weight (not where it equals the embedding) and
layers.N.attention_norm.weight, layers.N.ffn_norm.weight. Rows of Q and K are in Hugging Face's
order, and nothing is transposed, padded or packed for a device: that is done when it is loaded.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from backend.errors import UserError
from backend.layers.embedding import VocabParallelEmbedding
from backend.layers.linear import LinearLayer
from backend.layers.linear_method import WeightSlot, whole
from backend.layers.norm import RMSNorm
from backend.layers.parallel import ParallelContext
from backend.models.checkpoint import TensorInfo, read_checkpoint
from backend.workspace.layout import WEIGHTS, read_manifest
from kernels.packing import pack_awq, unpack_awq

# Name in the decoder -> in a workspace.
MODULES = {
    "embed_tokens": "tok_embeddings",
    "lm_head.table": "output",
    "norm": "norm",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.qkv_proj": "attention.w_qkv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_up_proj": "feed_forward.w13",
    "mlp.down_proj": "feed_forward.w2",
}
GATE_UP = "feed_forward.w13"
GATE, UP = "feed_forward.w1", "feed_forward.w3"
LAYER = re.compile(r"^layers\.\d+\.")
RANK = re.compile(r"\.(\d+)\.\w+$")


def read_workspace(root: Path, parallel: ParallelContext) -> dict[str, TensorInfo]:
    """The tensors of this rank, by their names in the workspace `root`.

    Raises:
        UserError: the weights are parted for another number of ranks, or files are damaged.
    """
    ranks = read_manifest(root).tensor_para_size
    if ranks != parallel.world_size:
        raise UserError(
            f"The workspace {root} is made for tp {ranks}, not {parallel.world_size}.",
            f"Load it with tp {ranks}, or convert the model again.",
            field="tp",
        )
    return {
        name: info
        for name, info in read_checkpoint(str(root / WEIGHTS)).items()
        if (found := RANK.search(name)) is None or int(found[1]) == parallel.rank
    }


def workspace_slots(module: nn.Module, rank: int, prefix: str = "") -> dict[str, WeightSlot]:
    """Where each tensor of a workspace goes in a decoder, or a layer of one. Before processing.

    A slot of scales_zeros has memory of its own; `unpack_scales_zeros` brings it to its place.

    Args:
        module: one rank's share of the model.
        prefix: "layers.N." if `module` is layer N.
    """
    slots: dict[str, WeightSlot] = {}
    for path, child in module.named_modules():
        if not isinstance(child, (VocabParallelEmbedding, RMSNorm, LinearLayer)):
            continue
        name = stored_name(prefix + path)
        if isinstance(child, VocabParallelEmbedding):
            (slot,) = child.weight_slots().values()
            slots[f"{name}.weight"] = slot
        elif isinstance(child, RMSNorm):
            slots[f"{name}.weight"] = whole(child.weight)
        else:
            slots.update(_linear_slots(child, name, rank))
    return slots


def _linear_slots(layer: LinearLayer, name: str, rank: int) -> dict[str, WeightSlot]:
    slots = {}
    for kind, weight in layer.weights.items():
        tensor = weight.tensor
        if kind == "qzeros":  # stored beside the scales
            continue
        if kind == "scales":
            slots[f"{name}.{rank}.scales_zeros"] = _owned(tensor)
        elif name.endswith(GATE_UP) and "qweight" not in layer.weights:
            halves = zip((GATE, UP), tensor.chunk(2, 0))
            for own, half in halves:
                slots[f"{name.removesuffix(GATE_UP)}{own}.{rank}.{kind}"] = _slot(half)
        else:
            slots[f"{name}.{rank}.{kind}"] = _slot(tensor)
    return slots


def _slot(tensor: Tensor) -> WeightSlot:
    return WeightSlot(tuple(tensor.shape), tuple(slice(0, n) for n in tensor.shape), tensor)


def _owned(scales: Tensor) -> WeightSlot:
    return _slot(scales.new_empty(*scales.shape, 2))


def unpack_scales_zeros(module: nn.Module, rank: int, slots: dict[str, WeightSlot]) -> None:
    """Bring the slots' scales and zeros to the layers that they belong to."""
    for name, layer in _packed_layers(module):
        scales, zeros = slots[f"{name}.{rank}.scales_zeros"].destination.unbind(-1)
        layer.weights["scales"].tensor.copy_(scales)
        layer.weights["qzeros"].tensor.copy_(pack_awq(zeros.to(torch.uint8)))


def pack_scales_zeros(
    module: nn.Module, rank: int, slots: dict[str, WeightSlot], prefix: str
) -> None:
    """The other way: fill the slots from the layers."""
    for name, layer in _packed_layers(module, prefix):
        stored = slots[f"{name}.{rank}.scales_zeros"].destination
        stored[..., 0] = layer.weights["scales"].tensor
        stored[..., 1] = unpack_awq(layer.weights["qzeros"].tensor)


def _packed_layers(module: nn.Module, prefix: str = "") -> list[tuple[str, LinearLayer]]:
    return [
        (stored_name(prefix + path), child)
        for path, child in module.named_modules()
        if isinstance(child, LinearLayer) and "qzeros" in child.weights
    ]


def stored_name(path: str) -> str:
    """What a workspace calls a module, by its path in the decoder."""
    found = LAYER.match(path)
    start = found[0] if found else ""
    return start + MODULES[path.removeprefix(start)]
