"""From a batch to drawn tokens: numbers, tensors, forward pass, sampler. Owns the KV pool."""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Sequence as Items
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from backend.config import EngineConfig
from backend.engine import kv_cache, kv_plan, messages, sampler
from backend.engine.cuda_graph import DecodeSteps
from backend.engine.kv_cache import KVShape
from backend.engine.prompt_steps import MOST_TOKENS, PromptSteps, extra_bytes
from backend.engine.ranks import resolve_device
from backend.engine.step_input import placeholder, prepare
from backend.engine.types import (
    Batch,
    ModelInfo,
    SampledToken,
    Sequence,
    StepInput,
    StepOutOfMemoryError,
)
from backend.errors import UserError
from backend.layers.parallel import ParallelContext
from backend.models.loader import load_model
from backend.models.long_context import LongContext, warn_of_length
from backend.models.model_config import ModelConfig
from backend.models.registry import read_model_config
from kernels import ops
from kernels.dispatch import reference_only
from kernels.ops import AttentionMetadata, KVCache

log = logging.getLogger(__name__)

ARRAY_TYPES = {torch.int32: "i", torch.int64: "q"}


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
        if config.batch_invariant and (not on_gpu or config.tp > 2):
            # NCCL adds up more than two ranks in an order that depends on the tensor's size.
            raise UserError(
                "batch_invariant needs a GPU, and at most tp 2.",
                "Leave it out.",
                field="batch_invariant",
            )
        self._parallel = parallel
        self._peers = peers
        model_config = read_model_config(config.model, long_context(config))
        dtype = compute_dtype(config, model_config, self.device)
        self._reference = config.kernels == "reference"
        with reference_only(self._reference):  # weights stay as its operations read them
            self.model, _ = load_model(
                config.model, dtype, self.device, parallel, config.session_len,
                long_context=long_context(config), batch_invariant=config.batch_invariant,
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
            config.kv_cache_bits, kv_cache.static_params(config, model_config, parallel),
        )  # fmt: skip
        self._decode_steps: DecodeSteps | None = None
        self._prompt_steps: PromptSteps | None = None
        self.kv_caches: list[KVCache] = []
        try:
            self.info = self._plan(config, model_config, shape)
            self.kv_caches = kv_cache.allocate(
                shape, self.info.num_blocks * self.block_size, self.device
            )
            prepare_s = self._prepare(config) if on_gpu and not self._reference else 0.0
            if on_gpu:
                self.info.device_bytes = torch.cuda.memory_reserved(self.device) * config.tp
        except torch.OutOfMemoryError as error:
            raise UserError(
                "The GPU has too little memory for this model's steps and KV cache.",
                "Lower cache_max_entry_count, max_batch_size or max_prefill_token_num, or free "
                "memory on the GPU.",
                field="cache_max_entry_count",
            ) from error
        _report(self.info, loaded - start, prepare_s, time.perf_counter() - start)

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
            if step.draw is not None:
                sampler.give_back(step.draw, sequences)
            torch.cuda.empty_cache()
            raise StepOutOfMemoryError(
                f"The GPU has no memory for a step of {len(step.token_ids)} tokens."
            ) from error

    def collect(self, launched: Launched) -> list[SampledToken]:
        """Wait for a launched step, and return its tokens."""
        if launched.arrived is not None:
            launched.arrived.synchronize()
        if launched.on_the_way is None:
            return launched.sampled
        return [SampledToken(token) for token in launched.on_the_way.tolist()]

    def close(self) -> None:
        """Let the other ranks go; they end when their pipes close."""
        for peer in self._peers:
            peer.close()
        self._parallel.close()

    @torch.inference_mode()
    def compute(self, step: StepInput, sequences: list[Sequence] | None = None) -> Launched:
        """One rank's part of a step. Further ranks know of no `sequences`."""
        with reference_only(self._reference):
            return self._compute(step, sequences)

    def _compute(self, step: StepInput, sequences: list[Sequence] | None) -> Launched:
        one_each = len(step.sample_rows) == len(step.query_lens) == len(step.token_ids)
        if self._decode_steps is not None and one_each:
            logits = self._decode_steps.run(step)[: len(step.sample_rows)]
        else:
            logits = self._forward(step)
            if step.draw is not None and step.sample_rows:
                self._last_drawn[: len(logits)] = sampler.draw(logits, step.draw)
        if step.draw is None and step.sample_rows:
            return Launched(self._draw_on_host(logits, sequences))
        if sequences is None or not self.max_ahead:
            return Launched([])
        return self._fetch(len(sequences))

    def _fetch(self, count: int) -> Launched:
        """The drawn tokens on their way to the host.

        Of a prompt's middle piece too, which has none, so that the host never runs further ahead
        than a step.
        """
        tokens = torch.empty(count, dtype=torch.int64, pin_memory=True)
        tokens.copy_(self._last_drawn[:count], non_blocking=True)
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
            input_ids = ops.resolve_tokens(input_ids, self._last_drawn)
        positions = self._tensor(step.positions, torch.int64)
        rope_steps: Tensor | int = 0
        if any(step.rope_steps):
            counts = zip(step.rope_steps, step.query_lens)
            rope_steps = self._tensor([s for s, n in counts for _ in range(n)], torch.int64)
        steps, metadata = self._prompt_steps, self._metadata(step)
        if steps is not None and steps.fits(len(step.token_ids)):
            hidden = steps.run(input_ids, positions, rope_steps, metadata)
        else:
            hidden = self.model(input_ids, positions, self.kv_caches, metadata, rope_steps)
        if len(step.sample_rows) != len(step.token_ids):
            hidden = hidden[self._tensor(step.sample_rows, torch.int64)]
        return self.model.compute_logits(hidden)

    def _logits(
        self, input_ids: Tensor, positions: Tensor, rope_steps: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        """Logits float32 [T, vocab] of every token."""
        return self.model.compute_logits(
            self.model(input_ids, positions, self.kv_caches, metadata, rope_steps)
        )

    def _tensor(self, values: Items[int], dtype: torch.dtype) -> Tensor:
        """Numbers [n] on their way to the device."""
        if not values:
            return torch.empty(0, dtype=dtype, device=self.device)
        # Seven times as fast as `torch.tensor` with the thousands of numbers of a prompt.
        numbers = torch.frombuffer(array(ARRAY_TYPES[dtype], values), dtype=dtype)
        return sampler.to_device(numbers, self.device)

    def _metadata(self, step: StepInput) -> AttentionMetadata:
        """A CPU's operations read the host's lists, and are spared tensors that say the same."""
        with_tensors = bool(self.max_ahead) or self._reference
        starts, width = [0], max(map(len, step.block_tables)) if with_tensors else 0
        for length in step.query_lens:
            starts.append(starts[-1] + length)
        tables = [
            block
            for t in (step.block_tables if with_tensors else [])
            for block in (*t, *[0] * (width - len(t)))
        ]
        longer = [i for i, length in enumerate(step.query_lens) if length > 1]
        return AttentionMetadata(
            slot_mapping=self._tensor(step.slot_mapping, torch.int64),
            block_table=self._tensor(tables, torch.int32).view(-1, max(width, 1)),
            cu_seqlens_q=self._tensor(starts if with_tensors else [], torch.int32),
            seq_lens_k=self._tensor(step.seq_lens if with_tensors else [], torch.int32),
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
        if self._parallel.rank == 0:
            warn_of_length(model_config, longest)
        step_bytes = self._measure_steps(config, shape, longest) if self.max_ahead else 0
        free = kv_cache.free_memory(self.device)
        if self.device.type == "cpu":
            free //= config.tp  # the ranks share one machine's memory
        num_blocks = kv_plan.plan_blocks(
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
            session_len=kv_plan.usable_session_len(num_blocks, self.block_size, longest),
            max_batch_size=config.max_batch_size,
            num_blocks=num_blocks,
            block_size=self.block_size,
            kv_bits=shape.bits,
            quantization=model_config.quantization.method if model_config.quantization else "",
            weight_bytes=self.model.weight_bytes() * config.tp,
            kv_bytes_per_token=shape.bytes_per_token * config.tp,
            tp=config.tp,
            rope_bounds=self.model.rotary.bounds,
        )

    @torch.inference_mode()
    def _measure_steps(self, config: EngineConfig, shape: KVShape, longest: int) -> int:
        """Bytes that steps take beside weights and pool: runs the largest, with a small pool.

        That also compiles the kernels for it, and makes libraries take their workspaces.
        """
        most = config.max_batch_size * longest  # more tokens are never there at once
        tokens = self._largest_step(config, longest)
        self.kv_caches = kv_cache.allocate(shape, self.block_size, self.device)
        # The second for what the graphs of decoding keep of their own, with the logits that they
        # share; the third for those of prompts.
        sizes = {tokens, config.max_batch_size, min(tokens, MOST_TOKENS)}
        peaks = sum(self._peak(size, config, longest) for size in sizes)
        self.kv_caches = []
        recorded = extra_bytes(self.model, tokens)
        logits = 4 * config.max_batch_size * self.model.config.vocab_size
        copies = kv_cache.prefill_copy_bytes(shape, most)
        # A little more than seen: the allocator's blocks are not always filled to the brim.
        return int(1.1 * peaks) + recorded + logits + copies + (64 << 20)

    def _largest_step(self, config: EngineConfig, longest: int) -> int:
        """Tokens of it."""
        most = min(config.max_prefill_token_num, config.max_batch_size * longest)
        return max(most, config.max_batch_size)

    def _peak(self, tokens: int, config: EngineConfig, longest: int) -> int:
        """Bytes that an eager step of so many tokens takes at its height."""
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        lengths = [longest] * (tokens // longest) + ([tokens % longest] if tokens % longest else [])
        self.compute(placeholder(lengths, min(tokens, config.max_batch_size), self.block_size))
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    @torch.inference_mode()
    def _prepare(self, config: EngineConfig) -> float:
        """Record the graphs, and compile what other steps run; seconds it took."""
        start = time.perf_counter()
        steps = DecodeSteps(
            self._logits,
            self._last_drawn,
            vocab_size=self.info.vocab_size,
            block_size=self.block_size,
            max_blocks=-(-self.info.session_len // self.block_size),
            batch_invariant=config.batch_invariant,
            capture=not config.eager_mode,
        )
        steps.prepare()
        # Kernels have forms by the number of tokens; nobody should wait for one to be compiled.
        room = min(self.info.session_len, config.max_prefill_token_num)
        for lengths in ([16], [64], [128], [256], [512], [1024], [1, 1, 30]):
            if max(lengths) <= room and len(lengths) <= config.max_batch_size:
                self.compute(placeholder(lengths, len(lengths), self.block_size))
        if not config.batch_invariant:  # there the kernels' own time is what counts
            most = self._largest_step(config, self.info.session_len)
            self._prompt_steps = PromptSteps(
                self.model, self.kv_caches, most, self.device, capture=not config.eager_mode
            )
        torch.cuda.synchronize(self.device)
        self._decode_steps = steps
        return time.perf_counter() - start


def long_context(config: EngineConfig) -> LongContext:
    """What a model does beyond its trained length, as the settings have it."""
    return LongContext(config.rope_scaling_factor, config.use_logn_attn)


def _report(info: ModelInfo, load_s: float, prepare_s: float, total_s: float) -> None:
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
    graphs = f", CUDA graphs and kernels {prepare_s:.1f} s" if prepare_s else ""
    log.info("Started in %.1f s: weights %.1f s%s", total_s, load_s, graphs)


def compute_dtype(
    config: EngineConfig, model: ModelConfig, device: torch.device
) -> torch.dtype:
    """What an engine computes in."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    stored: torch.dtype = getattr(torch, model.dtype)
    if device.type == "cuda" or stored == torch.float32:
        return stored
    # Without instructions for bfloat16, a CPU is faster in float32.
    has_bfloat16 = torch.cpu.get_capabilities().get("avx512_bf16")
    return torch.bfloat16 if has_bfloat16 else torch.float32
