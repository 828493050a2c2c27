"""Who owns which block of the KV pool.

A block is free (holds nothing), cached (holds a prefix that no sequence uses at the moment) or
owned (by one or more sequences): free + cached + owned = total, always. Full blocks are known by a
hash of all tokens up to their end (and of their rotary frequencies' step), so that a new prompt
starts from the longest prefix that is still there. Blocks of one sequence are laid out one after
another where possible: a CPU then reads its KV as one slab (`performance`: gathering pages costs
nine times as much).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict

from backend.engine.types import Sequence

# A new run of blocks gets this many where possible, by evicting that many cached blocks at once:
# evicting one at a time would scatter a growing sequence over the pool block by block.
MIN_RUN = 8


class BlockManager:
    """Reference-counted blocks with hashed prefixes.

    Args:
        num_blocks: size of the pool.
        block_size: tokens in a block.
        enable_prefix_caching: keep finished sequences' full blocks for later prompts.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_count = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._taken = bytearray(num_blocks)  # 0: free; searched by `find` for runs of zeros
        self._cursor = 0  # where the search for the next run begins
        self.num_free = num_blocks

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_available(self) -> int:
        return self.num_free + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def attach(self, seq: Sequence, reserve: int = 0) -> bool:
        """Give a sequence without blocks room for all its tokens, reusing a cached prefix.

        Sets `num_computed_tokens` to the reused tokens; at least one token is left to compute,
        because its logits are wanted.

        Returns:
            False, with nothing changed, if fewer than `reserve` blocks would be left.
        """
        prefix = self._match_prefix(seq)
        needed = self.blocks_for(len(seq.token_ids)) - len(prefix)
        revived = sum(1 for block in prefix if self._ref_count[block] == 0)
        if needed + revived + reserve > self.num_available:
            return False
        for block in prefix:
            if self._ref_count[block] == 0:
                del self._cached[block]
            self._ref_count[block] += 1
            self._append(seq, block)
        seq.num_computed_tokens = len(prefix) * self.block_size
        seq.num_hashed_blocks = len(prefix)
        self._allocate(seq, needed)
        return True

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Make room for `num_tokens` tokens in all; False, with nothing changed, if it fails."""
        missing = self.blocks_for(num_tokens) - len(seq.block_table)
        if missing <= 0:
            return True
        if missing > self.num_available:
            return False
        self._allocate(seq, missing)
        return True

    def mark_computed(self, seq: Sequence) -> None:
        """Make the blocks that `num_computed_tokens` fills known as a prefix for others."""
        full = min(seq.num_computed_tokens, len(seq.token_ids)) // self.block_size
        if not self.enable_prefix_caching or full <= seq.num_hashed_blocks:
            return
        hashes = self._hashes(seq, full)
        for index in range(seq.num_hashed_blocks, full):
            block = seq.block_table[index]
            if hashes[index] not in self._block_of:  # else another sequence computed the same
                self._block_of[hashes[index]] = block
                self._hash_of[block] = hashes[index]
        seq.num_hashed_blocks = full

    def release(self, seq: Sequence) -> None:
        """Take all blocks back. Tails become the oldest, so that prefixes outlive them."""
        for block in reversed(seq.block_table):
            self._ref_count[block] -= 1
            if self._ref_count[block]:
                continue
            if self._hash_of[block] is None:
                self._taken[block] = 0
                self.num_free += 1
            else:
                self._cached[block] = None
        # New lists, because a step that was prepared may still hold the old ones.
        seq.block_table = []
        seq.block_runs = []
        seq.num_computed_tokens = 0
        seq.num_hashed_blocks = 0

    def _hashes(self, seq: Sequence, count: int) -> list[bytes]:
        """Chained hashes of the first `count` full blocks of tokens, kept with the sequence."""
        hashes, size = seq.block_hashes, self.block_size
        step = seq.rope_step.to_bytes(2, "little")
        while len(hashes) < count:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else seq.request.owner.encode()
            tokens = array("I", seq.token_ids[start : start + size]).tobytes()
            digest = hashlib.blake2b(tokens, digest_size=16, key=parent[:64], person=step)
            hashes.append(digest.digest())
        return hashes

    def _match_prefix(self, seq: Sequence) -> list[int]:
        if not self.enable_prefix_caching:
            return []
        usable = (len(seq.token_ids) - 1) // self.block_size
        blocks: list[int] = []
        for digest in self._hashes(seq, usable)[:usable]:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _append(self, seq: Sequence, block: int) -> None:
        runs = seq.block_runs
        if runs and sum(runs[-1]) == block:
            runs[-1][1] += 1
        else:
            runs.append([block, 1])
        seq.block_table.append(block)

    def _allocate(self, seq: Sequence, count: int) -> None:
        """Append `count` blocks, next to the last one where that is free; the caller checked."""
        expected = self.blocks_for(seq.num_prompt_tokens + seq.max_tokens) - len(seq.block_table)
        for left in range(count, 0, -1):
            block = seq.block_table[-1] + 1 if seq.block_table else self.num_blocks
            if block >= self.num_blocks or self._taken[block]:
                block = self._start_run(left, max(expected, left))
            self._taken[block] = 1
            self.num_free -= 1
            self._ref_count[block] = 1
            self._append(seq, block)
            expected -= 1

    def _start_run(self, needed: int, expected: int) -> int:
        """First block of a free run, of `expected` blocks if there is one, else a shorter one."""
        if self.num_free < needed:
            self._evict(max(needed, MIN_RUN) - self.num_free)
        length = min(expected, self.num_free)
        while True:
            run = bytes(length)
            start = self._taken.find(run, self._cursor)
            if start < 0:
                start = self._taken.find(run)
            if start >= 0:
                self._cursor = start + length
                return start
            length = (length + 1) // 2

    def _evict(self, count: int) -> None:
        for _ in range(min(count, len(self._cached))):
            block, _ = self._cached.popitem(last=False)
            digest = self._hash_of[block]
            assert digest is not None
            del self._block_of[digest]
            self._hash_of[block] = None
            self._taken[block] = 0
            self.num_free += 1
