"""How large the KV pool is, and the pool itself."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field

import psutil
import torch
from torch import Tensor

from backend.config import EngineConfig
from backend.errors import UserError
from backend.layers.parallel import ParallelContext
from backend.models.kv_params import BITS, read_kv_params, stored_params
from backend.models.model_config import ModelConfig
from kernels.ops import LARGEST_KV_COPY, KVCache

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KVShape:
    """What one rank's pool holds for a token."""

    num_layers: int
    num_kv_heads: int  # on this rank
    head_dim: int
    dtype: torch.dtype  # of the model
    quant_policy: int  # bits of an element, 0 for dtype's: EngineConfig.kv_cache_bits
    # Measured beforehand, as `read_kv_params` gives them; None: by token and head, as they come.
    static_params: Tensor | None = field(default=None, compare=False)

    @property
    def bits(self) -> int:
        """Of an element."""
        return self.quant_policy or 8 * self.dtype.itemsize

    @property
    def bytes_per_token(self) -> int:
        """K and V of all layers, with such scales and zeros as are kept by token."""
        by_token = self.quant_policy and self.static_params is None
        vector = self.head_dim * self.bits // 8 + (4 if by_token else 0)
        return 2 * self.num_layers * self.num_kv_heads * vector


def static_params(
    config: EngineConfig, model: ModelConfig, parallel: ParallelContext
) -> Tensor | None:
    """Scales and zeros that the model's folder has for its KV cache, where that is quantized.

    Raises:
        UserError: the file is damaged or of another model.
    """
    if not config.kv_cache_bits:
        return None
    params = read_kv_params(config.model, model, parallel)
    if params is None or parallel.rank > 0:
        return params
    name = os.path.basename(stored_params(config.model) or "")
    log.info("The KV cache is scaled by head, as %s in the model's folder says", name)
    if config.kv_cache_bits < BITS:
        # The bundled model loses 0.093 nats a token to them in 4 bits, by token 0.034; in 8 bits
        # less than 0.001 either way.
        log.warning(
            "In 4 bits such scales are coarse: move %s away, and they follow each token.", name
        )
    return params


def allocate(shape: KVShape, num_slots: int, device: torch.device) -> list[KVCache]:
    """A pool for each layer. Zeros on a GPU; a CPU takes its memory when it is first written.

    On a GPU a head's slots lie side by side in memory, on a CPU a slot's heads do: gathering 16
    short sequences there takes 100 µs a layer so, and 190 µs the other way round.
    """
    make = torch.empty if device.type == "cpu" else torch.zeros

    def pool() -> torch.Tensor:
        size = (shape.num_kv_heads, num_slots, shape.head_dim)
        if not shape.quant_policy:
            if device.type == "cpu":
                return make((num_slots, size[0], size[2]), dtype=shape.dtype).transpose(0, 1)
            return make(size, dtype=shape.dtype, device=device)
        packed = (*size[:2], shape.head_dim * shape.bits // 8)
        return make(packed, dtype=torch.uint8, device=device)

    def params(layer: int, which: int) -> torch.Tensor | None:
        if not shape.quant_policy:
            return None
        if shape.static_params is None:
            size = (shape.num_kv_heads, num_slots, 2)
            return make(size, dtype=torch.float16, device=device)
        by_head = shape.static_params[layer, which].clone()  # [heads, 2]
        # The same range in as many steps as there are.
        by_head[:, 0] *= (2**BITS - 1) / (2**shape.bits - 1)
        by_head[:, 0].clamp_(min=1e-7)  # less is 0 in float16
        half = by_head.half().to(device)
        return half.unsqueeze(1).expand(-1, num_slots, -1)

    bits = shape.quant_policy or 16
    static = shape.static_params is not None
    return [
        KVCache(pool(), pool(), bits, params(layer, 0), params(layer, 1), static)
        for layer in range(shape.num_layers)
    ]


def prefill_copy_bytes(shape: KVShape, tokens: int) -> int:
    """Bytes of the 16-bit copy of one layer's quantized KV that attention of prompts may make.

    `tokens`: that all sequences of a step can have together.
    """
    if not shape.quant_policy:
        return 0
    return min(4 * tokens * shape.num_kv_heads * shape.head_dim, LARGEST_KV_COPY)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def plan_blocks(
    config: EngineConfig, bytes_per_token: int, session_len: int, free: int, step_bytes: int
) -> int:
    """Blocks of the pool of one rank.

    Args:
        session_len: tokens of the longest conversation.
        free: bytes that are free with the weights loaded.
        step_bytes: what a step needs of them.

    Raises:
        UserError: it was asked for more than there is.
    """
    block_size = config.cache_block_seq_len
    block_bytes = bytes_per_token * block_size
    available = max(free - step_bytes, 0) // block_bytes
    asked = _blocks_asked_for(config, block_bytes)
    if asked is None:
        share = int(free * config.cache_max_entry_count) // block_bytes
        # More than this can never be in use at once.
        useful = config.max_batch_size * -(-session_len // block_size)
        return min(share, available, useful)
    field, blocks = asked
    if blocks > available:
        raise UserError(
            f"A KV cache of {blocks * block_size} tokens needs {blocks * block_bytes / 1e9:.2f} "
            f"GB, but {available * block_bytes / 1e9:.2f} GB of memory are free for it.",
            f"Lower {field}.",
            field=field,
        )
    return blocks


def _blocks_asked_for(config: EngineConfig, block_bytes: int) -> tuple[str, int] | None:
    """(setting, blocks) where the pool's size was given, not a share of the memory."""
    if config.kv_cache_tokens is not None and config.kv_cache_gb is not None:
        raise UserError(
            "kv_cache_tokens and kv_cache_gb are both given.", "Give one.", field="kv_cache_gb"
        )
    if config.kv_cache_tokens is not None:
        return "kv_cache_tokens", -(-config.kv_cache_tokens // config.cache_block_seq_len)
    if config.kv_cache_gb is not None:
        return "kv_cache_gb", int(config.kv_cache_gb * 1e9) // block_bytes
    if config.cache_max_entry_count >= 1:
        return "cache_max_entry_count", int(config.cache_max_entry_count)
    return None


def usable_session_len(num_blocks: int, block_size: int, longest: int) -> int:
    """Tokens of a conversation that fits the pool; says so if that is less than `longest`.

    Raises:
        UserError: the pool is too small for any.
    """
    tokens = num_blocks * block_size
    if tokens < 16:
        raise UserError(
            f"The KV cache has room for {tokens} tokens only.",
            "Raise cache_max_entry_count, or free memory on the device.",
            field="cache_max_entry_count",
        )
    if tokens < longest:
        log.warning(
            "The KV cache holds %d tokens, so a conversation may have that many, not %d.",
            tokens,
            longest,
        )
    return min(longest, tokens)
