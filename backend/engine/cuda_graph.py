"""Decoding steps as CUDA graphs: from token ids in to token ids out, one launch from the host.

A graph is recorded for each of a few batch sizes; a smaller batch is padded. What changes from
step to step (positions, lengths, block tables, how tokens are drawn) comes to the device in one
copy before the graph runs. Tokens that the step before drew never leave the device: the graph takes
them from where that step put them, so the host can prepare a step before it knows them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence as Items

import torch
from torch import Tensor

from backend.engine.types import DrawParams, StepInput
from kernels import ops
from kernels.ops import AttentionMetadata

FEW_ROWS = 4  # of changed block tables: sent one by one

# input_ids, positions, rope steps, metadata -> float32 logits of every token
Forward = Callable[[Tensor, Tensor, Tensor, AttentionMetadata], Tensor]


def batch_sizes(max_batch_size: int) -> list[int]:
    """Sizes that graphs are recorded for, up to and with the largest."""
    sizes = [1, 2, 4, 8, *range(16, 64, 8), *range(64, 128, 16), *range(128, 4096, 32)]
    return [size for size in sizes if size < max_batch_size] + [max_batch_size]


class DecodeSteps:
    """Steps in which every sequence computes one token and draws the next.

    Args:
        forward: the model.
        last_drawn: int64 [max_batch_size]: the tokens of the last step by row, and of the next.
        max_blocks: of one sequence.
        capture: record graphs; without, the same is run launch by launch.
    """

    def __init__(
        self,
        forward: Forward,
        last_drawn: Tensor,
        *,
        vocab_size: int,
        block_size: int,
        max_blocks: int,
        batch_invariant: bool,
        capture: bool,
    ) -> None:
        self._forward = forward
        self._last_drawn = last_drawn
        self._block_size = block_size
        self._batch_invariant = batch_invariant
        self._pool = torch.cuda.graph_pool_handle() if capture else None
        # One for all, since cuBLAS keeps a workspace for every stream that it was used on.
        self._stream = torch.cuda.Stream() if capture else None
        # One for all sizes too: as each graph's own result they would add up.
        self._logits = torch.empty(
            len(last_drawn), vocab_size, dtype=torch.float32, device=last_drawn.device
        )
        self._vocab_size = vocab_size
        self._max_blocks = max_blocks
        self._sizes = batch_sizes(len(last_drawn))
        self._steps: dict[int, _Step] = {}

    def prepare(self) -> float:
        """Record all graphs, so that none is recorded while requests wait; seconds it took."""
        start = time.perf_counter()
        for size in reversed(self._sizes):  # the largest first: others' passing needs fit into it
            self._step(size)
        return time.perf_counter() - start

    def run(self, step: StepInput) -> Tensor:
        """Compute the step and draw its tokens into `last_drawn`.

        Returns:
            Logits float32 [at least the batch, vocab], valid until the next run. Without
            `step.draw` the tokens drawn are the likeliest.
        """
        size = next(size for size in self._sizes if size >= len(step.token_ids))
        prepared = self._step(size)
        prepared.load(step)
        if prepared.graph is None:
            self._compute(prepared)
        else:
            prepared.graph.replay()
        return self._logits

    def _step(self, size: int) -> _Step:
        if size in self._steps:
            return self._steps[size]
        step = _Step(size, self._max_blocks, self._vocab_size, self._last_drawn.device)
        step.metadata = AttentionMetadata(
            slot_mapping=step.slots,
            block_table=step.block_table,
            cu_seqlens_q=torch.arange(size + 1, dtype=torch.int32, device=step.slots.device),
            seq_lens_k=step.seq_lens,
            query_lens=[1] * size,
            seq_lens=[],
            kv_runs=[],
            block_size=self._block_size,
            num_decodes=size,
            max_query_len=1,
            max_seq_len=self._max_blocks * self._block_size,
            batch_invariant=self._batch_invariant,
        )
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):  # kernels are compiled, workspaces made here
                self._compute(step)
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Only this thread's calls matter: NCCL's watchdog makes some of its own meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                self._compute(step)
            step.graph = graph
        self._steps[size] = step
        return step

    def _compute(self, step: _Step) -> None:
        input_ids = ops.resolve_tokens(step.token_ids, self._last_drawn)
        logits = self._logits[: step.size]
        logits.copy_(self._forward(input_ids, step.positions, step.rope_steps, step.metadata))
        tokens = ops.sample(
            logits, step.temperature, step.top_k, step.top_p, step.min_p, step.uniform
        )
        self._last_drawn[: step.size] = tokens


class _Step:
    """One size's inputs: on the device, and as the host fills them, side by side in one buffer."""

    metadata: AttentionMetadata

    def __init__(self, size: int, max_blocks: int, vocab_size: int, device: torch.device) -> None:
        self.size = size
        self.graph: torch.cuda.CUDAGraph | None = None
        self._vocab_size = vocab_size
        longs, floats, ints = 5 * size * 8, 4 * size * 4, size * 4
        total = longs + floats + ints
        on_device = torch.zeros(total, dtype=torch.uint8, device=device)
        # Two on the host, because the copy of one may still wait behind the step before.
        pinned = device.type == "cuda"
        self._hosts = [torch.zeros(total, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._device = on_device

        def views(buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return (
                buffer[:longs].view(torch.int64).view(5, size),
                buffer[longs : longs + floats].view(torch.float32).view(4, size),
                buffer[longs + floats :].view(torch.int32),
            )

        self._host_views = [views(host) for host in self._hosts]
        numbers, draws, self.seq_lens = views(on_device)
        self.token_ids, self.positions, self.rope_steps, self.slots, self.top_k = numbers
        self.temperature, self.top_p, self.min_p, self.uniform = draws
        # Tables are sent row by row: sequences mostly stay, and grow a block now and then.
        self.block_table = torch.zeros(size, max_blocks, dtype=torch.int32, device=device)
        self._known: list[tuple[list[int], int]] = [([], 0)] * size

    def load(self, step: StepInput) -> None:
        """Bring a step's numbers to the device, without waiting for it."""
        self._hosts.reverse()
        self._host_views.reverse()
        numbers, draws, seq_lens = self._host_views[0]
        draw = step.draw or DrawParams()
        vocab = self._vocab_size
        numbers.copy_(
            self._padded(
                step.token_ids,
                step.positions,
                step.rope_steps,
                step.slot_mapping,
                [min(k or vocab, vocab) for k in draw.top_k],
                padding=(0, 0, 0, -1, vocab),
            )
        )
        draws.copy_(
            self._padded(
                draw.temperature, draw.top_p, draw.min_p, draw.uniform, padding=(0.0, 1.0, 0.0, 0.0)
            )
        )
        seq_lens.copy_(self._padded(step.seq_lens, padding=(0,))[0])
        self._device.copy_(self._hosts[0], non_blocking=True)
        tables = step.block_tables
        changed = [row for row, blocks in enumerate(tables) if not self._is_known(row, blocks)]
        if len(changed) > FEW_ROWS:  # someone left, and those behind moved up
            width = max(map(len, tables))
            self._send([t + [0] * (width - len(t)) for t in tables], slice(0, len(tables)), width)
        else:
            for row in changed:
                self._send(tables[row], row, len(tables[row]))
        for row in changed:
            self._known[row] = (tables[row], len(tables[row]))

    def _is_known(self, row: int, blocks: list[int]) -> bool:
        """Whether the device has this table: the same list, not grown, or one that says the same
        (as on ranks beside rank 0, for which each step's lists are new)."""
        known, length = self._known[row]
        return length == len(blocks) and (known is blocks or known == blocks)

    def _send(self, values: list[int] | list[list[int]], rows: int | slice, width: int) -> None:
        fresh = torch.tensor(values, dtype=torch.int32)
        fresh = fresh.pin_memory() if self.block_table.is_cuda else fresh
        self.block_table[rows, :width].copy_(fresh, non_blocking=True)

    def _padded(self, *rows: Items[float], padding: tuple[float, ...]) -> Tensor:
        return torch.tensor(
            [[*row, *[fill] * (self.size - len(row))] for row, fill in zip(rows, padding)]
        )
