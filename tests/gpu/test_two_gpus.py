"""Tensor parallelism over NCCL: two GPUs write what one does, prompts and replies in graphs."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import torch

from backend.benchmark.engine_session import open_engine
from backend.config import EngineConfig, SamplingParams
from backend.engine.launcher import ProcessHandle
from backend.engine.types import Request

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo_model"


async def replies(tp: int, prompts: list[list[int]]) -> list[list[int]]:
    """What each prompt is answered with, all of them at once."""
    config = EngineConfig(
        model=str(DEMO), device="cuda", dtype="float32", tp=tp, session_len=512, max_batch_size=8,
        kv_cache_tokens=8192,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)

    async def ask(number: int, prompt: list[int]) -> list[int]:
        found: list[int] = []
        async for output in session.engine.generate(Request(str(number), prompt, sampling)):
            found += output.token_ids
        return found

    async with open_engine(config, ProcessHandle) as session:
        assert session.info.tp == tp
        return await asyncio.gather(*(ask(i, prompt) for i, prompt in enumerate(prompts)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_write_what_one_does():
    source = random.Random(3)
    prompts = [
        [source.randrange(6144) for _ in range(length)] for length in (1, 7, 40, 130, 300, 17)
    ]
    one, two = (asyncio.run(replies(tp, prompts)) for tp in (1, 2))
    assert two == one and all(len(reply) == 32 for reply in one)
