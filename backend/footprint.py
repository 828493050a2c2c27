"""What a model will take of a device's memory, and what that will hold, before it is loaded.

`measure` looks at the model and the device, which takes PyTorch and a moment; `fit` is arithmetic
over what it found, fast enough to follow a form.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from backend.config import EngineConfig
from backend.engine.kv_plan import bytes_per_token, plan_blocks, usable_session_len
from backend.errors import UserError
from backend.memory import gpu_memory
from backend.workspace.layout import tensor_para_size, text_folder, weights_folder

PROJECT = Path(__file__).resolve().parents[1]
PROCESS_BYTES = 500 << 20  # an engine's own: PyTorch's on a CPU, the context on a GPU


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
    tp: int = 1

    def refreshed(self) -> Footprint:
        """With what is free by now."""
        if self.device == "cpu":
            return replace(self, free=psutil.virtual_memory().available)
        used, total = gpu_memory(self.tp)
        return replace(self, free=total - used) if total else self


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
    size = _token_bytes(footprint, config)
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


def taken(footprint: Footprint, config: EngineConfig) -> int:
    """About how many bytes an engine takes whose KV cache is given in `kv_cache_tokens`."""
    pool = (config.kv_cache_tokens or 0) * _token_bytes(footprint, config)
    return footprint.weight_bytes + pool + _step_bytes(footprint, config) + PROCESS_BYTES


def _token_bytes(footprint: Footprint, config: EngineConfig) -> int:
    """Of a token in the KV cache."""
    bits = config.kv_cache_bits or footprint.dtype_bits
    by_token = bool(config.kv_cache_bits) and not footprint.static_kv
    return bytes_per_token(
        footprint.num_layers, footprint.num_kv_heads, footprint.head_dim, bits, by_token
    )


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

    ranks = max(config.tp, tensor_para_size(config.model))
    parallel = ParallelContext(0, ranks)
    model, _ = check_model(config.model, parallel, config.session_len)
    device = resolve_device(config, 0)
    dtype = compute_dtype(config, model, device)
    on_gpu = device.type == "cuda"
    total = torch.cuda.mem_get_info(device)[1] if on_gpu else psutil.virtual_memory().total
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
        tp=devices,
    )


class Footprints:
    """Looks at each model once while its files stay as they are, in a process of its own, so that
    PyTorch's memory is given back. For one event loop."""

    def __init__(self) -> None:
        self._found: dict[tuple[object, ...], asyncio.Task[Footprint]] = {}

    async def of(self, config: EngineConfig) -> Footprint:
        """A model's footprint, with the memory that is free now. Raises as `measure`."""
        key = (_marks(config.model), config.dtype, config.device, config.tp)
        looking = self._found.get(key)
        if looking is None or (looking.done() and looking.exception()):
            looking = self._found[key] = asyncio.create_task(_measure_apart(config))
        found = await asyncio.shield(looking)  # others may wait for it, too
        return found.refreshed()


async def _measure_apart(config: EngineConfig) -> Footprint:
    """`python -m backend.footprint`; it ends by itself, whatever becomes of this process."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "backend.footprint", cwd=PROJECT, stdin=PIPE, stdout=PIPE,
        stderr=DEVNULL,
    )  # fmt: skip
    asked = {**asdict(config), "model": os.path.abspath(config.model)}
    answer, _ = await child.communicate(json.dumps(asked).encode())
    if child.returncode:
        raise RuntimeError(f"backend.footprint ended with {child.returncode}")
    found = json.loads(answer)
    if "error" in found:
        raise UserError(found["error"], found["hint"], field=found["field"])
    return Footprint(**found)


def _marks(model: str) -> tuple[object, ...]:
    """What is another when the model in a folder is."""
    folders = {weights_folder(model), text_folder(model)}
    names = sorted(path for folder in folders for path in folder.glob("*") if path.suffix != ".ini")
    return (os.path.realpath(model), *((path.name, path.stat().st_mtime_ns) for path in names))


def main() -> None:
    """An EngineConfig as JSON on standard input becomes a Footprint, or an error, on the output."""
    try:
        found = asdict(measure(EngineConfig(**json.load(sys.stdin))))
    except UserError as error:
        found = {"error": error.message, "hint": error.hint, "field": error.field}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
