"""From a batch to drawn tokens: numbers, tensors, forward pass, sampler. Owns the KV pool."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from backend.config import EngineConfig
from backend.engine import kv_cache, messages, sampler
from backend.engine.cuda_graph import DecodeSteps
from backend.engine.kv_cache import KVShape
from backend.engine.ranks import resolve_device
from backend.engine.step_input import prepare
from backend.engine.types import (
    Batch,
    DrawParams,
    ModelInfo,
    SampledToken,
    Sequence,
    StepInput,
    StepOutOfMemoryError,
)
from backend.errors import UserError
from backend.layers.parallel import ParallelContext
from backend.models.loader import load_model
from backend.models.model_config import ModelConfig
from backend.models.registry import read_model_config
from kernels.ops import AttentionMetadata, KVCache

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Launched:
    """A step's tokens: known, or on their way to the host until `arrived`."""

    sampled: list[SampledToken]
    on_the_way: Tensor | None = None  # int64 [S], pinned
    arrived: torch.cuda.Event | None = None


class ModelRunner:
    """A loaded model with its KV pool, on one tensor parallel rank.

    Args:
        config: what to load, and how much memory to take.
        parallel: this rank's place among the others.
        peers: on rank 0, pipes to the other ranks, which compute the same steps.

    Raises:
        UserError: the model cannot be loaded, or there is no room for its KV cache.
    """

    def __init__(
        self, config: EngineConfig, parallel: ParallelContext, peers: Items[Connection] = ()
    ) -> None:
        start = time.perf_counter()
        self.device = resolve_device(config, parallel.rank)
        on_gpu = self.device.type == "cuda"
        if config.batch_invariant and not on_gpu:
            raise UserError(
                "batch_invariant needs a GPU.", "Leave it out.", field="batch_invariant"
            )
        self._parallel = parallel
        self._peers = peers
        model_config = read_model_config(config.model)
        dtype = _dtype(config, model_config, self.device)
        self.model, _ = load_model(
            config.model, dtype, self.device, parallel, config.session_len,
            batch_invariant=config.batch_invariant,
        )  # fmt: skip
        loaded = time.perf_counter()
        self.block_size = config.cache_block_seq_len
        self._batch_invariant = config.batch_invariant
        self.max_ahead = int(on_gpu)
        self._last_drawn = torch.zeros(
            config.max_batch_size, dtype=torch.int64, device=self.device
        )
        shape = KVShape(
            model_config.num_layers, self.model.num_kv_heads, model_config.head_dim, dtype,
            config.quant_policy, kv_cache.static_params(config, model_config, parallel),
        )  # fmt: skip
        self._decode_steps: DecodeSteps | None = None
        self.kv_caches: list[KVCache] = []
        self.info = self._plan(config, model_config, shape)
        self.kv_caches = kv_cache.allocate(
            shape, self.info.num_blocks * self.block_size, self.device
        )
        graph_s = 0.0
        if on_gpu:
            self._decode_steps = DecodeSteps(
                self._logits,
                self._last_drawn,
                vocab_size=model_config.vocab_size,
                block_size=self.block_size,
                max_blocks=-(-self.info.session_len // self.block_size),
                batch_invariant=config.batch_invariant,
                capture=not config.eager_mode,
            )
            with torch.inference_mode():
                graph_s = self._decode_steps.prepare()
        _report(self.info, loaded - start, graph_s, time.perf_counter() - start)

    def launch(self, batch: Batch) -> Launched:
        """Start computing the batch, and drawing a token for each sequence whose end it reaches.

        Raises:
            StepOutOfMemoryError: there is no room for it. (Not with further ranks, which cannot
                take their part of a step back: there the engine is started again.)
        """
        step = prepare(batch, self.block_size)
        sequences = [s.sequence for s in batch.scheduled if s.samples]
        if self.max_ahead and all(map(sampler.draws_on_device, sequences)):
            step.draw = sampler.draw_params(sequences)
        for peer in self._peers:
            peer.send_bytes(messages.encode(step))
        try:
            return self.compute(step, sequences)
        except torch.OutOfMemoryError as error:
            if self._peers:
                raise
            torch.cuda.empty_cache()
            raise StepOutOfMemoryError(
                f"The GPU has no memory for a step of {len(step.token_ids)} tokens."
            ) from error

    def collect(self, launched: Launched) -> list[SampledToken]:
        """Wait for the tokens of a launched step."""
        if launched.on_the_way is None or launched.arrived is None:
            return launched.sampled
        launched.arrived.synchronize()
        return [SampledToken(token) for token in launched.on_the_way.tolist()]

    def close(self) -> None:
        """Let the other ranks go; they end when their pipes close."""
        for peer in self._peers:
            peer.close()
        self._parallel.close()

    @torch.inference_mode()
    def compute(self, step: StepInput, sequences: list[Sequence] | None = None) -> Launched:
        """One rank's part of a step. Further ranks know of no `sequences`."""
        one_each = len(step.sample_rows) == len(step.query_lens) == len(step.token_ids)
        if self._decode_steps is not None and one_each:
            logits = self._decode_steps.run(step)[: len(step.sample_rows)]
        else:
            logits = self._forward(step)
            if step.draw is not None and step.sample_rows:
                self._last_drawn[: len(logits)] = sampler.draw(logits, step.draw)
        if not step.sample_rows:
            return Launched([])
        if step.draw is None:
            return Launched(self._draw_on_host(logits, sequences))
        if sequences is None:
            return Launched([])
        tokens = torch.empty(len(logits), dtype=torch.int64, pin_memory=True)
        tokens.copy_(self._last_drawn[: len(logits)], non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return Launched([], tokens, arrived)

    def _draw_on_host(
        self, logits: Tensor, sequences: list[Sequence] | None
    ) -> list[SampledToken]:
        """Rank 0 draws and, where tokens stay on the device, tells the others what."""
        sampled = [] if sequences is None else sampler.sample(logits, sequences)
        if self.max_ahead:
            drawn = self._last_drawn[: len(logits)]
            if sequences is not None:
                drawn.copy_(torch.tensor([token.token_id for token in sampled]))
            self._parallel.broadcast(drawn)
        return sampled

    def _forward(self, step: StepInput) -> Tensor:
        """Logits float32 [len(sample_rows), vocab]; the KV of all tokens goes into the pool."""
        input_ids = self._tensor(step.token_ids, torch.int64)
        if min(step.token_ids) < 0:
            drawn = self._last_drawn[(-1 - input_ids).clamp(min=0)].clamp(min=0)
            input_ids = torch.where(input_ids < 0, drawn, input_ids)
        positions = self._tensor(step.positions, torch.int64)
        hidden = self.model(input_ids, positions, self.kv_caches, self._metadata(step))
        if len(step.sample_rows) != len(step.token_ids):
            hidden = hidden[self._tensor(step.sample_rows, torch.int64)]
        return self.model.compute_logits(hidden)

    def _logits(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Logits float32 [T, vocab] of every token."""
        return self.model.compute_logits(
            self.model(input_ids, positions, self.kv_caches, metadata)
        )

    def _tensor(self, values: Items[int], dtype: torch.dtype) -> Tensor:
        return sampler.to_device(torch.tensor(values, dtype=dtype), self.device)

    def _metadata(self, step: StepInput) -> AttentionMetadata:
        """A CPU reads the host's lists, so it is spared the tensors that say the same."""
        on_gpu = self.device.type != "cpu"
        starts, width = [0], max(map(len, step.block_tables)) if on_gpu else 0
        for length in step.query_lens:
            starts.append(starts[-1] + length)
        tables = [t + [0] * (width - len(t)) for t in step.block_tables] if on_gpu else []
        longer = [i for i, length in enumerate(step.query_lens) if length > 1]
        return AttentionMetadata(
            slot_mapping=self._tensor(step.slot_mapping, torch.int64),
            block_table=self._tensor(tables, torch.int32),  # type: ignore[arg-type]
            cu_seqlens_q=self._tensor(starts if on_gpu else [], torch.int32),
            seq_lens_k=self._tensor(step.seq_lens if on_gpu else [], torch.int32),
            query_lens=step.query_lens,
            seq_lens=step.seq_lens,
            kv_runs=step.kv_runs,
            block_size=self.block_size,
            num_decodes=longer[0] if longer else len(step.query_lens),
            max_query_len=max(step.query_lens),
            max_seq_len=max(step.seq_lens),
            batch_invariant=self._batch_invariant,
        )

    def _plan(
        self, config: EngineConfig, model_config: ModelConfig, shape: KVShape
    ) -> ModelInfo:
        """How many blocks there are, and with them how long a conversation may be."""
        longest = config.session_len or model_config.max_position_embeddings
        step_bytes = self._measure_step(config, shape, longest) if self.max_ahead else 0
        free = kv_cache.free_memory(self.device)
        if self.device.type == "cpu":
            free //= config.tp  # the ranks share one machine's memory
        num_blocks = kv_cache.plan_blocks(
            config, shape.bytes_per_token, longest, free, step_bytes
        )
        # All ranks must mean the same block by the same number.
        counts = torch.tensor([[num_blocks]], device=self.device)
        num_blocks = int(self._parallel.all_gather(counts).min())
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return ModelInfo(
            architecture=model_config.architecture,
            device=name,
            dtype=str(shape.dtype).split(".")[-1],
            vocab_size=model_config.vocab_size,
            session_len=kv_cache.usable_session_len(num_blocks, self.block_size, longest),
            max_batch_size=config.max_batch_size,
            num_blocks=num_blocks,
            block_size=self.block_size,
            kv_bits=shape.bits,
            quantization=model_config.quantization.method if model_config.quantization else "",
            weight_bytes=self.model.weight_bytes() * config.tp,
            kv_bytes_per_token=shape.bytes_per_token * config.tp,
            tp=config.tp,
        )

    @torch.inference_mode()
    def _measure_step(self, config: EngineConfig, shape: KVShape, longest: int) -> int:
        """Bytes that the largest step takes beside weights and pool: runs one, with a small pool.

        That also compiles the kernels for it, and makes libraries take their workspaces.
        """
        tokens = config.max_prefill_token_num
        lengths = [longest] * (tokens // longest) + ([tokens % longest] if tokens % longest else [])
        samples = min(config.max_batch_size, tokens)
        step = StepInput(
            token_ids=[0] * tokens,
            positions=[i for length in lengths for i in range(length)],
            slot_mapping=[-1] * tokens,
            query_lens=lengths,
            seq_lens=lengths,
            kv_runs=[],
            block_tables=[[0] * -(-length // self.block_size) for length in lengths],
            sample_rows=list(range(samples)),
            draw=DrawParams(
                [1.0] * samples, [1] * samples, [0.5] * samples, [0.0] * samples, [0.5] * samples
            ),
        )
        self.kv_caches = kv_cache.allocate(shape, self.block_size, self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.compute(step)
        torch.cuda.synchronize(self.device)
        self.kv_caches = []
        peak = torch.cuda.max_memory_allocated(self.device)
        # A little more than seen: the allocator's blocks are not always filled to the brim.
        return int(1.1 * (peak - before)) + (64 << 20)


def _report(info: ModelInfo, load_s: float, graph_s: float, total_s: float) -> None:
    tokens = info.num_blocks * info.block_size
    log.info(
        "%s, %s%s on %s: weights %.2f GB; KV cache %.2f GB: %d tokens of %d bits, which is %.1f "
        "conversations of %d",
        info.architecture,
        info.quantization + " " if info.quantization else "",
        info.dtype,
        info.device,
        info.weight_bytes / 1e9,
        tokens * info.kv_bytes_per_token / 1e9,
        tokens,
        info.kv_bits,
        tokens / info.session_len,
        info.session_len,
    )
    graphs = f", CUDA graphs {graph_s:.1f} s" if graph_s else ""
    log.info("Started in %.1f s: weights %.1f s%s", total_s, load_s, graphs)


def _dtype(config: EngineConfig, model: ModelConfig, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    stored: torch.dtype = getattr(torch, model.dtype)
    if device.type == "cuda" or stored == torch.float32:
        return stored
    # Without instructions for bfloat16, a CPU is faster in float32.
    has_bfloat16 = torch.cpu.get_capabilities().get("avx512_bf16")
    return torch.bfloat16 if has_bfloat16 else torch.float32
