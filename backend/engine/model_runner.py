"""From a batch to drawn tokens: numbers, tensors, forward pass, sampler. Owns the KV pool."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Items
from multiprocessing.connection import Connection

import psutil
import torch
from torch import Tensor

from backend.config import EngineConfig
from backend.engine import messages
from backend.engine.ranks import resolve_device
from backend.engine.sampler import sample
from backend.engine.step_input import prepare
from backend.engine.types import Batch, ModelInfo, SampledToken, StepInput
from backend.errors import UserError
from backend.layers.parallel import ParallelContext
from backend.models.loader import load_model
from backend.models.model_config import ModelConfig
from backend.models.registry import read_model_config
from kernels.ops import AttentionMetadata

log = logging.getLogger(__name__)


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
        self.device = resolve_device(config, parallel.rank)
        model_config = read_model_config(config.model)
        dtype = _dtype(config, model_config, self.device)
        self.model, _ = load_model(config.model, dtype, self.device, parallel, config.session_len)
        self.block_size = config.cache_block_seq_len
        self._parallel = parallel
        self._peers = peers
        self.info = self._size_cache(config, model_config, dtype)
        slots = self.info.num_blocks * self.block_size
        shape = (slots, self.model.num_kv_heads, model_config.head_dim)
        self.kv_caches = [
            (
                torch.empty(shape, dtype=dtype, device=self.device),
                torch.empty(shape, dtype=dtype, device=self.device),
            )
            for _ in range(model_config.num_layers)
        ]
        log.info(
            "%s, %s on %s: weights %.2f GB; KV cache %d blocks of %d tokens, %d bytes a token",
            model_config.architecture,
            self.info.dtype,
            self.info.device,
            self.info.weight_bytes / 1e9,
            self.info.num_blocks,
            self.block_size,
            self.info.kv_bytes_per_token,
        )

    def execute(self, batch: Batch) -> list[SampledToken]:
        """Compute the batch and draw a token for each sequence whose end it reaches."""
        step = prepare(batch, self.block_size)
        for peer in self._peers:
            peer.send_bytes(messages.encode(step))
        logits = self.forward(step)
        if not step.sample_rows:
            return []
        return sample(logits, [s.sequence for s in batch.scheduled if s.samples])

    def close(self) -> None:
        """Let the other ranks go; they end when their pipes close."""
        for peer in self._peers:
            peer.close()
        self._parallel.close()

    @torch.inference_mode()
    def forward(self, step: StepInput) -> Tensor:
        """Logits float32 [len(sample_rows), vocab]; the KV of all tokens goes into the pool."""
        input_ids = self._tensor(step.token_ids, torch.int64)
        positions = self._tensor(step.positions, torch.int64)
        hidden = self.model(input_ids, positions, self.kv_caches, self._metadata(step))
        if len(step.sample_rows) != len(step.token_ids):
            hidden = hidden[self._tensor(step.sample_rows, torch.int64)]
        return self.model.compute_logits(hidden)

    def _tensor(self, values: Items[int], dtype: torch.dtype) -> Tensor:
        if self.device.type == "cpu":
            return torch.tensor(values, dtype=dtype)
        return torch.tensor(values, dtype=dtype, pin_memory=True).to(self.device, non_blocking=True)

    def _metadata(self, step: StepInput) -> AttentionMetadata:
        """A CPU reads the host's lists, so it is spared the tensors that say the same."""
        on_gpu = self.device.type != "cpu"
        starts, width = [0], max(map(len, step.block_tables)) if on_gpu else 0
        for length in step.query_lens:
            starts.append(starts[-1] + length)
        tables = [t + [0] * (width - len(t)) for t in step.block_tables] if on_gpu else []
        return AttentionMetadata(
            slot_mapping=self._tensor(step.slot_mapping, torch.int64),
            block_table=self._tensor(tables, torch.int32),  # type: ignore[arg-type]
            cu_seqlens_q=self._tensor(starts if on_gpu else [], torch.int32),
            seq_lens_k=self._tensor(step.seq_lens if on_gpu else [], torch.int32),
            query_lens=step.query_lens,
            seq_lens=step.seq_lens,
            kv_runs=step.kv_runs,
            block_size=self.block_size,
        )

    def _size_cache(
        self, config: EngineConfig, model_config: ModelConfig, dtype: torch.dtype
    ) -> ModelInfo:
        """How many blocks there are, and with them how long a conversation may be."""
        weight_bytes = self.model.weight_bytes()
        per_token = (
            2
            * model_config.num_layers
            * self.model.num_kv_heads
            * model_config.head_dim
            * dtype.itemsize
        )
        block_bytes = per_token * self.block_size
        longest = config.session_len or model_config.max_position_embeddings
        count, free = config.cache_max_entry_count, _free_memory(self.device)
        if self.device.type == "cpu":
            free //= config.tp  # the ranks share one machine's memory
        if count >= 1:
            num_blocks = int(count)
            if num_blocks * block_bytes > free:
                raise UserError(
                    f"A KV cache of {num_blocks} blocks needs {num_blocks * block_bytes / 1e9:.1f} "
                    f"GB, but {free / 1e9:.1f} GB of memory are free.",
                    "Lower cache_max_entry_count.",
                    field="cache_max_entry_count",
                )
        else:
            # More than this can never be in use at once.
            useful = config.max_batch_size * -(-longest // self.block_size)
            num_blocks = min(useful, int(free * count) // block_bytes)
        # All ranks must mean the same block by the same number.
        counts = torch.tensor([[num_blocks]], device=self.device)
        num_blocks = int(self._parallel.all_gather(counts).min())
        session_len = min(longest, num_blocks * self.block_size)
        if session_len < 16:
            raise UserError(
                f"The KV cache has room for {session_len} tokens only.",
                "Raise cache_max_entry_count, or free memory on the device.",
                field="cache_max_entry_count",
            )
        if session_len < longest:
            log.warning(
                "The KV cache holds %d tokens, so a conversation may have that many, not %d.",
                session_len,
                longest,
            )
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return ModelInfo(
            architecture=model_config.architecture,
            device=name,
            dtype=str(dtype).split(".")[-1],
            vocab_size=model_config.vocab_size,
            session_len=session_len,
            max_batch_size=config.max_batch_size,
            num_blocks=num_blocks,
            block_size=self.block_size,
            weight_bytes=weight_bytes * config.tp,
            kv_bytes_per_token=per_token * config.tp,
            tp=config.tp,
        )


def _dtype(config: EngineConfig, model: ModelConfig, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    stored: torch.dtype = getattr(torch, model.dtype)
    if device.type == "cuda" or stored == torch.float32:
        return stored
    # Without instructions for bfloat16, a CPU is faster in float32.
    has_bfloat16 = torch.cpu.get_capabilities().get("avx512_bf16")
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
