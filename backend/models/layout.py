"""How a family's checkpoints name their tensors, and which of them hold Q, K and V in one: as data.

Every decoder asks for Llama's names ("model.layers.0.self_attn.q_proj.weight"). A family whose
checkpoints have others has a Layout, which presents the stored tensors under those names, and puts
them back together for a checkpoint that is written. Loading, sharding and quantizing know Llama's
names only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from backend.errors import UserError
from backend.models.checkpoint import Runs, TensorInfo
from backend.models.model_config import ModelConfig

# What a module stores -> (the dimension of its outputs, outputs in an element along it).
KINDS = {
    "weight": (0, 1),
    "bias": (0, 1),
    "scale": (0, 1),  # of 8-bit weights
    "qweight": (1, 8),  # AWQ: 4-bit numbers in words of 32
    "qzeros": (1, 8),
    "scales": (1, 1),
}
QKV = tuple(f"model.layers.*.self_attn.{name}_proj" for name in "qkv")
LAYER = re.compile(r"\.(\d+)\.")


def stacked(config: ModelConfig) -> tuple[Runs, Runs, Runs]:
    """All of Q, then all of K, then all of V."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return ((0, q),), ((q, kv),), ((q + kv, kv),)


def by_kv_head(config: ModelConfig) -> tuple[Runs, Runs, Runs]:
    """For each KV head its query heads, then its K, then its V (InternLM2)."""
    size, queries = config.head_dim, config.num_heads // config.num_kv_heads
    starts = range(0, config.num_kv_heads * (queries + 2) * size, (queries + 2) * size)
    return (
        tuple((start, queries * size) for start in starts),
        tuple((start + queries * size, size) for start in starts),
        tuple((start + (queries + 1) * size, size) for start in starts),
    )


@dataclass(frozen=True)
class Layout:
    """A family's names. Those that it does not list are Llama's.

    Attributes:
        modules: a module's name in the checkpoint -> in the decoder; * is the layer's number.
        qkv: name in the checkpoint of the module that holds Q, K and V; None if there is none.
        order: which of that module's outputs Q, K and V are.
    """

    modules: Mapping[str, str] = field(default_factory=dict)
    qkv: str | None = None
    order: Callable[[ModelConfig], tuple[Runs, Runs, Runs]] = stacked

    def stored_name(self, name: str) -> str:
        """What the checkpoint calls a tensor of the decoder, or the one that holds it."""
        module, number, kind = _split(name)
        stored = next((own for own, ours in self.modules.items() if ours == module), module)
        if self.qkv is not None and module in QKV:
            stored = self.qkv
        return _join(stored, number, kind)

    def decoder_names(self, entry: str) -> list[str]:
        """The decoder's modules that (a part of) a stored module's name stands for.

        As quantization configs name what they leave out: "wqkv", "layers.0.attention".
        """
        found = LAYER.search(f"{entry}.")
        part = LAYER.sub(".*.", f".{entry.strip('.')}.", count=1)
        ours = [own for stored, own in self.modules.items() if part in f".{stored}."]
        if self.qkv is not None and part in f".{self.qkv}.":
            ours += QKV
        # Without a layer's number a module's name within its layer stands for it in all.
        return [
            module.replace("*", found[1]) if found else module.rpartition("*.")[2]
            for module in ours
        ]

    def present(
        self, config: ModelConfig, tensors: Mapping[str, TensorInfo]
    ) -> dict[str, TensorInfo]:
        """A checkpoint's tensors, by the decoder's names.

        Raises:
            UserError: two tensors stand for one, or Q, K and V together have another size than
                config.json asks for.
        """
        presented: dict[str, TensorInfo] = {}
        for stored, info in tensors.items():
            for name, part in self._parts(config, stored, info):
                if name in presented:
                    raise UserError(
                        f"The checkpoint holds both {presented[name].name:.200} and "
                        f"{stored:.200}, which are the same weights in a {config.architecture}.",
                        "config.json and weights do not belong together.",
                    )
                presented[name] = part
        return presented

    def _parts(
        self, config: ModelConfig, stored: str, info: TensorInfo
    ) -> list[tuple[str, TensorInfo]]:
        """What one stored tensor is to the decoder."""
        module, number, kind = _split(stored)
        if module != self.qkv or kind not in KINDS:
            return [(_join(self.modules.get(module, module), number, kind), info)]
        dim, divisor = KINDS[kind]
        parts = []
        total = 0
        for name, runs in zip(QKV, self.order(config), strict=True):
            if any(start % divisor or length % divisor for start, length in runs):
                raise UserError(
                    f"{stored:.200} stores {divisor} outputs together, which heads of "
                    f"{config.head_dim} do not fill.",
                    "config.json and weights do not belong together.",
                )
            in_elements = tuple((start // divisor, length // divisor) for start, length in runs)
            length = sum(length for _, length in in_elements)
            shape = (*info.shape[:dim], length, *info.shape[dim + 1 :])
            part = replace(info, shape=shape, dim=dim, runs=in_elements)
            parts.append((_join(name, number, kind), part))
            total += length
        if dim >= len(info.shape) or info.shape[dim] != total:
            raise UserError(
                f"{stored:.200} has the shape {list(info.shape)}, but config.json asks for {total} "
                f"at its dimension {dim}.",
                "config.json and weights do not belong together. Download the model again.",
            )
        return parts

    def restore(self, config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by the decoder's names, as a checkpoint of the family holds them.

        Of Q, K and V all three must be there, or none.
        """
        stored: dict[str, Tensor] = {}
        fused: dict[str, list[Tensor]] = defaultdict(list)
        for name, tensor in tensors.items():
            if self.qkv is None or _split(name)[0] not in QKV:
                stored[self.stored_name(name)] = tensor
                continue
            whole = self.stored_name(name)
            if whole not in fused:
                _, number, kind = _split(name)
                fused[whole] = [tensors[_join(part, number, kind)] for part in QKV]
        for name, parts in fused.items():
            dim, divisor = KINDS[_split(name)[2]]
            shape = list(parts[0].shape)
            shape[dim] = sum(part.shape[dim] for part in parts)
            whole_tensor = torch.empty(shape, dtype=parts[0].dtype)
            for part, runs in zip(parts, self.order(config), strict=True):
                at = 0
                for start, length in ((a // divisor, n // divisor) for a, n in runs):
                    whole_tensor.narrow(dim, start, length).copy_(part.narrow(dim, at, length))
                    at += length
            stored[name] = whole_tensor
        return stored


LLAMA = Layout()


def _split(name: str) -> tuple[str, str, str]:
    """A tensor's name as (module with * for the layer's number, that number, what it stores)."""
    module, _, kind = name.rpartition(".")
    found = LAYER.search(module)
    return LAYER.sub(".*.", module, count=1), found[1] if found else "", kind


def _join(module: str, number: str, kind: str) -> str:
    return f"{module.replace('*', number)}.{kind}"
