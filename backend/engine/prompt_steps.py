"""Steps with prompts in them as CUDA graphs, in pieces: everything but attention.

Between two attentions a decoder's work is shaped by the number of tokens alone, so it is recorded
for a few numbers of tokens, each when it first comes, and a step is padded up to one. Attention,
shaped by each sequence's length, is launched between the pieces. Without graphs the host takes 20
to 40 ms to launch a step of a 7B model, longer than a GPU needs for one that has some hundred
tokens: while prompts come in, everybody's next token waited for that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from backend.layers.attention import AttentionCall
from backend.models.decoder import Decoder
from kernels.ops import AttentionMetadata, KVCache

MOST_TOKENS = 1024  # of a recorded step: a larger one keeps the GPU busier than the host
SIZES = (16, 32, 64, 96, *range(128, 513, 64), 640, 768)
GRAPHS_BYTES = 1 << 20  # of a size's graphs on the device, a layer; some 0.9 MB were seen


def outputs(model: Decoder, most_tokens: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Room for an attention's output [tokens, heads, head_dim], and for the last norm's [tokens,
    hidden_size], of as many tokens as are recorded."""
    tokens, config, dtype = min(most_tokens, MOST_TOKENS), model.config, model.norm.weight.dtype
    heads = torch.zeros(tokens, model.num_heads, config.head_dim, dtype=dtype, device=device)
    return heads, torch.zeros(tokens, config.hidden_size, dtype=dtype, device=device)


def token_counts(most: int) -> list[int]:
    """Numbers of tokens that steps are recorded for, up to and with the largest."""
    most = min(most, MOST_TOKENS)
    return [size for size in SIZES if size < most] + [most]


def extra_bytes(model: Decoder, most_tokens: int) -> int:
    """What all sizes take beside the passing needs of the largest."""
    graphs = len(token_counts(most_tokens)) * model.config.num_layers * GRAPHS_BYTES
    return graphs + sum(room.nbytes for room in outputs(model, most_tokens, "meta"))


class PromptSteps:
    """The decoder's part of steps of any layout, their tokens padded to one of a few numbers.

    Args:
        kv_caches: each layer's pool.
        most_tokens: of a step; larger ones than `MOST_TOKENS` are for the caller.
        capture: record graphs; without, the same is run launch by launch.
    """

    def __init__(
        self,
        model: Decoder,
        kv_caches: list[KVCache],
        most_tokens: int,
        device: torch.device,
        *,
        capture: bool,
    ) -> None:
        self._model, self._kv_caches = model, kv_caches
        self._attended, self._hidden = outputs(model, most_tokens, device)
        # Every size's inputs: whatever a longer step left behind the last token is valid.
        self._inputs = torch.zeros(3, len(self._hidden), dtype=torch.int64, device=device)
        self._sizes = token_counts(most_tokens)
        self._capture = capture
        self._pool = torch.cuda.graph_pool_handle() if capture else None
        self._stream = torch.cuda.Stream() if capture else None
        self._recorded: dict[int, list[_Piece]] = {}

    def fits(self, tokens: int) -> bool:
        """Whether steps of so many are this object's."""
        return tokens <= self._sizes[-1]

    def run(
        self,
        input_ids: Tensor,
        positions: Tensor,
        rope_steps: Tensor | int,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """Hidden states after the last norm, [T, hidden_size], valid until the next run.

        Args:
            input_ids, positions: int64 [T].
            rope_steps: int64 [T], or one for all.
        """
        count = len(input_ids)
        size = next(size for size in self._sizes if size >= count)
        for buffer, values in zip(self._inputs, (input_ids, positions, rope_steps)):
            buffer[:count] = values
        attended = self._attended[:count]
        if not self._capture:
            def attend(call: AttentionCall) -> Tensor:
                call.first(count).run(metadata, attended)
                return self._attended[:size]

            self._run(size, attend)
        else:
            for missing in (self._sizes[-1], size):  # the others fit into the largest's memory
                if missing not in self._recorded:
                    self._recorded[missing] = self._record(missing)
            for graph, call in self._recorded[size]:
                graph.replay()
                if call is not None:
                    call.first(count).run(metadata, attended)
        return self._hidden[:count]

    def _run(self, size: int, attend: Callable[[AttentionCall], Tensor]) -> None:
        """All that is recorded, with `attend` in place of attention."""
        ids, positions, rope_steps = self._inputs[:, :size]
        self._hidden[:size] = self._model(ids, positions, self._kv_caches, attend, rope_steps)

    def _record(self, size: int) -> list[_Piece]:
        """One size's graphs, each with the attention after it."""
        pieces: list[_Piece] = []
        graph = torch.cuda.CUDAGraph()
        assert self._stream is not None

        def begin() -> None:
            # Only this thread's calls matter: NCCL's watchdog makes some of its own meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

        def interrupt(call: AttentionCall) -> Tensor:
            nonlocal graph
            graph.capture_end()
            pieces.append(_Piece(graph, call.borrowed()))
            graph = torch.cuda.CUDAGraph()
            begin()
            return self._attended[:size]

        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Kernels are compiled, and libraries take their workspaces, in a run before.
            self._run(size, lambda call: self._attended[:size])
            torch.cuda.synchronize()
            begin()
            try:
                self._run(size, interrupt)
            finally:  # also where memory ran out: a stream must not go on recording
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return [*pieces, _Piece(graph, None)]


class _Piece(NamedTuple):
    graph: torch.cuda.CUDAGraph
    call: AttentionCall | None  # that follows; None after the last
