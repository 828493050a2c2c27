"""What a model will take and hold, told before it is loaded, is what the engine then says."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace

import pytest

import app
from backend.config import EngineConfig
from backend.engine.model_runner import ModelRunner
from backend.errors import UserError
from backend.footprint import Footprint, Footprints, fit, measure
from backend.layers.parallel import ParallelContext
from tests.tiny_model import make_checkpoint
from tests.unit.test_awq import quantize_checkpoint

GB = 10**9
LLAMA_7B = Footprint(
    "cpu", "float16", "", int(13.48 * GB), 32, 32, 128, 16, False, 4096, 32000, 4096, 11008,
    80 * GB, 60 * GB,
)  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"quant_policy": 8}, {"dtype": "bfloat16"}])
def test_it_is_what_the_engine_says(tmp_path, options):
    make_checkpoint(tmp_path / "model", "llama")
    config = EngineConfig(str(tmp_path / "model"), device="cpu", max_batch_size=3, **options)
    told = fit(measure(config), config)
    info = ModelRunner(config, ParallelContext()).info
    assert told.footprint.weight_bytes == info.weight_bytes
    assert (told.kv_bytes_per_token, told.kv_bits) == (info.kv_bytes_per_token, info.kv_bits)
    assert told.tokens == info.num_blocks * info.block_size  # as many as three can use
    assert told.session_len == info.session_len
    assert told.footprint.dtype == info.dtype


def test_of_the_bundled_model_whose_head_is_its_embedding():
    config = EngineConfig(str(app.BUNDLED_MODEL), device="cpu", max_batch_size=1)
    info = ModelRunner(config, ParallelContext()).info
    assert measure(config).weight_bytes == info.weight_bytes


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_of_four_bits(tmp_path, dtype):
    make_checkpoint(tmp_path / "model", "llama", hidden_size=128)
    quantize_checkpoint(tmp_path / "model", 32)
    folder = str(tmp_path / "model")
    config = EngineConfig(folder, device="cpu", max_batch_size=1, dtype=dtype)
    info = ModelRunner(config, ParallelContext()).info
    # A device's own layout has scales of another size.
    assert measure(config).weight_bytes == pytest.approx(info.weight_bytes, rel=0.05)


def test_the_tutorials_table():
    """InternLM 7B in float16: 0.5 MiB a token, so that 2048 more tokens are 1 GiB."""
    assert fit(LLAMA_7B, EngineConfig()).kv_bytes_per_token == 512 << 10
    half = fit(LLAMA_7B, EngineConfig(quant_policy=8))
    assert half.kv_bytes_per_token == 264 << 10  # with a scale and a zero a vector
    static = fit(replace(LLAMA_7B, static_kv=True), EngineConfig(quant_policy=8))
    assert static.kv_bytes_per_token == 256 << 10
    assert half.room == pytest.approx(1.94 * fit(LLAMA_7B, EngineConfig()).room, rel=0.01)


def test_what_bounds_the_pool():
    few = fit(LLAMA_7B, EngineConfig(max_batch_size=2))
    assert few.tokens == 2 * 4096 and few.conversations == 2 and few.room > 60_000
    asked = fit(LLAMA_7B, EngineConfig(kv_cache_gb=5.0))
    assert asked.kv_bytes == pytest.approx(5 * GB, rel=0.01)
    with pytest.raises(UserError, match="memory are free for it"):
        fit(LLAMA_7B, EngineConfig(kv_cache_gb=50.0))
    assert fit(LLAMA_7B, EngineConfig(kv_cache_gb=50.0), freed=10 * GB).tokens > 90_000
    with pytest.raises(UserError, match="room for 0 tokens"):
        fit(replace(LLAMA_7B, free=10 * GB), EngineConfig())


def test_a_model_is_looked_at_once_and_apart(tmp_path):
    make_checkpoint(tmp_path / "model", "llama")
    config = EngineConfig(str(tmp_path / "model"), device="cpu")

    async def look() -> None:
        footprints = Footprints()
        first, second = await asyncio.gather(footprints.of(config), footprints.of(config))
        told = measure(config)
        assert replace(first, free=0) == replace(second, free=0) == replace(told, free=0)
        assert len(footprints._found) == 1
        weights = tmp_path / "model" / "model.safetensors"
        os.utime(weights, ns=(1, 1))
        with open(tmp_path / "model" / "config.json", "w") as file:
            file.write("{}")
        for _ in range(2):  # an error is not kept
            with pytest.raises(UserError, match="architecture"):
                await footprints.of(config)

    asyncio.run(look())
