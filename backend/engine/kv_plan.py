"""How large the KV pool becomes: arithmetic, without PyTorch."""

from __future__ import annotations

import logging

from backend.config import EngineConfig
from backend.errors import UserError

log = logging.getLogger(__name__)


def bytes_per_token(
    num_layers: int, num_kv_heads: int, head_dim: int, bits: int, by_token: bool
) -> int:
    """K and V of all layers.

    Args:
        bits: of an element.
        by_token: there are a scale and a zero (float16 each) beside every vector.
    """
    vector = head_dim * bits // 8 + (4 if by_token else 0)
    return 2 * num_layers * num_kv_heads * vector


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
