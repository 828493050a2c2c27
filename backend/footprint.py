"""What a model will take of a device's memory, and what that will hold, before it is loaded.

`measure` looks at the model and the device, which takes PyTorch and a moment; `fit` is arithmetic
over what it found, fast enough to follow a form.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from backend.config import EngineConfig
from backend.engine.kv_plan import bytes_per_token, plan_blocks, usable_session_len


@dataclass(frozen=True)
class Footprint:
    """A model as it would be on a device. Bytes are of all ranks together.

    Attributes:
        device: "cpu" or the GPU's name.
        dtype: computed in, as float32.
        weight_bytes: as loaded.
        num_layers, num_kv_heads, head_dim: of the KV cache.
        dtype_bits: of an element of a KV cache that is not quantized.
        static_kv: scales of a quantized KV cache were measured beforehand and take no room.
        longest: tokens that the model was trained for.
        total, free: the device's memory; what is free of it now.
    """

    device: str
    dtype: str
    quantization: str
    weight_bytes: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype_bits: int
    static_kv: bool
    longest: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    total: int
    free: int


@dataclass(frozen=True)
class Fit:
    """What the memory will hold.

    Attributes:
        kv_bits: of an element.
        tokens: of the KV pool.
        session_len: of the longest conversation.
        room: tokens that the memory could hold, did max_batch_size not bound the pool.
    """

    footprint: Footprint
    kv_bits: int
    kv_bytes_per_token: int
    tokens: int
    session_len: int
    room: int

    @property
    def kv_bytes(self) -> int:
        """Of the KV pool."""
        return self.tokens * self.kv_bytes_per_token

    @property
    def conversations(self) -> int:
        """That fit at their longest."""
        return self.tokens // self.session_len

    def describe(self) -> str:
        """For a terminal."""
        made, gb = self.footprint, 1e9
        return "\n".join((
            f"device         {made.device}, {made.free / gb:.2f} GB of {made.total / gb:.2f} free",
            f"weights        {made.weight_bytes / gb:.3f} GB as {made.quantization or made.dtype}",
            f"KV cache       {self.kv_bytes_per_token:,} bytes a token, {self.kv_bits} bits an "
            "element",
            f"               {self.kv_bytes / gb:.3f} GB hold {self.tokens:,} tokens: "
            f"{self.conversations:,} conversations of {self.session_len:,}",
            f"               memory has room for {self.room:,} tokens",
        ))


def fit(footprint: Footprint, config: EngineConfig, freed: int = 0) -> Fit:
    """What a model's memory holds with these settings.

    Args:
        freed: bytes that will be free besides, such as those of a model that it replaces.

    Raises:
        UserError: the KV cache that is asked for does not fit, or has no room for a conversation.
    """
    bits = config.kv_cache_bits or footprint.dtype_bits
    by_token = bool(config.kv_cache_bits) and not footprint.static_kv
    size = bytes_per_token(
        footprint.num_layers, footprint.num_kv_heads, footprint.head_dim, bits, by_token
    )
    longest = config.session_len or footprint.longest
    step = 0 if footprint.device == "cpu" else _step_bytes(footprint, config)
    free = max(footprint.free + freed - footprint.weight_bytes, 0)
    blocks = plan_blocks(config, size, longest, free, step)
    block = config.cache_block_seq_len
    share = min(config.cache_max_entry_count, 1.0)
    return Fit(
        footprint, bits, size, blocks * block, usable_session_len(blocks, block, longest),
        int(max(min(free * share, free - step), 0)) // size,
    )  # fmt: skip


def _step_bytes(footprint: Footprint, config: EngineConfig) -> int:
    """About what a step takes on a GPU; the engine measures it when it starts."""
    tokens = max(config.max_prefill_token_num, config.max_batch_size)
    wide = 4 * footprint.hidden_size + 3 * footprint.intermediate_size
    logits = 4 * config.max_batch_size * footprint.vocab_size
    return tokens * wide * footprint.dtype_bits // 8 + 2 * logits + (64 << 20)


def measure(config: EngineConfig) -> Footprint:
    """Look at the model in a folder, and at the device that it would be on.

    Raises:
        UserError: there is no such model, or no such device.
    """
    import torch

    from backend.engine.kv_cache import free_memory
    from backend.engine.model_runner import compute_dtype
    from backend.engine.ranks import resolve_device
    from backend.layers.parallel import ParallelContext
    from backend.models.kv_params import stored_params
    from backend.models.loader import check_model, weight_bytes
    from backend.workspace.layout import tensor_para_size

    ranks = max(config.tp, tensor_para_size(config.model))
    parallel = ParallelContext(0, ranks)
    model, _ = check_model(config.model, parallel, config.session_len)
    device = resolve_device(config, 0)
    dtype = compute_dtype(config, model, device)
    on_gpu = device.type == "cuda"
    total = torch.cuda.mem_get_info(device)[1] if on_gpu else _machine_bytes()
    devices = ranks if on_gpu else 1
    return Footprint(
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        dtype=str(dtype).removeprefix("torch."),
        quantization=model.quantization.method if model.quantization else "",
        weight_bytes=weight_bytes(model, parallel, dtype, device) * ranks,
        num_layers=model.num_layers,
        num_kv_heads=max(model.num_kv_heads, ranks),
        head_dim=model.head_dim,
        dtype_bits=8 * dtype.itemsize,
        static_kv=stored_params(config.model) is not None,
        longest=model.max_position_embeddings,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        total=total * devices,
        free=free_memory(device) * devices,
    )


async def measure_apart(config: EngineConfig) -> Footprint:
    """The same in a process of its own, so that PyTorch's memory is given back."""
    pool = ProcessPoolExecutor(1, get_context("spawn"))
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, measure, config)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _machine_bytes() -> int:
    import psutil

    return psutil.virtual_memory().total
