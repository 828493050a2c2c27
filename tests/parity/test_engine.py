"""The engine against transformers' generate: greedy token ids, however the work is cut up."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import kernels.cpu
from backend.config import EngineConfig, SamplingParams
from backend.engine.async_engine import AsyncEngine
from backend.engine.engine import Engine
from backend.engine.model_runner import ModelRunner
from backend.engine.types import Request
from backend.engine.worker import build_engine
from backend.errors import UserError
from backend.layers.parallel import ParallelContext
from kernels.dispatch import form_on
from tests.tiny_model import FAMILIES, make_checkpoint

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo_model"
TOKENS = 24


def prompts() -> list[list[int]]:
    """Several lengths; two share a beginning."""
    generator = torch.Generator().manual_seed(3)
    made = [
        torch.randint(0, 256, (length,), generator=generator).tolist()
        for length in (5, 40, 17, 33, 1)
    ]
    return [*made, made[1][:32] + made[0]]


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make_checkpoint(folder, request.param)
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint) -> list[list[int]]:
    """What generate says to each prompt, alone."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    replies = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            temperature=None,
            top_p=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        replies.append(out[0, len(prompt) :].tolist())
    return replies


def engine_for(folder: Path, **options) -> Engine:
    settings = dict(dtype="float32", device="cpu", session_len=128, cache_block_seq_len=8)
    return build_engine(EngineConfig(model=str(folder), **{**settings, **options}))


def made(index: int, prompt: list[int]) -> Request:
    return Request(str(index), prompt, SamplingParams(temperature=0.0, max_tokens=TOKENS))


def drain(engine: Engine, preempt_every: int = 0) -> list[list[int]]:
    """Replies by request id; optionally putting the oldest sequence out every few steps."""
    replies: dict[int, list[int]] = {}
    steps = 0
    while engine.has_work():
        for output in engine.step():
            replies.setdefault(int(output.request_id), []).extend(output.token_ids)
        steps += 1
        running = engine.scheduler.running
        if preempt_every and running and steps % preempt_every == 0:
            engine.scheduler.preempt(next(iter(running.values())))
    return [replies[i] for i in sorted(replies)]


def all_at_once(engine: Engine, **options) -> list[list[int]]:
    for i, prompt in enumerate(prompts()):
        engine.add_request(made(i, prompt))
    return drain(engine, **options)


def test_alone(checkpoint, expected):
    engine = engine_for(checkpoint, enable_prefix_caching=False)
    for i, prompt in enumerate(prompts()):
        engine.add_request(made(i, prompt))
        assert drain(engine) == [expected[i]]


def test_in_a_batch(checkpoint, expected):
    assert all_at_once(engine_for(checkpoint)) == expected


def test_on_plain_torch_operations(checkpoint, expected, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a form of the device's own")

    for name in kernels.cpu.__all__:
        monkeypatch.setattr(kernels.cpu, name, never)
    form_on.cache_clear()
    try:
        with pytest.raises(AssertionError, match="of the device's own"):
            all_at_once(engine_for(checkpoint))
        assert all_at_once(engine_for(checkpoint, kernels="reference")) == expected
        engine = engine_for(checkpoint, kernels="reference", quant_policy=8)
        assert len(all_at_once(engine)[0]) == TOKENS
    finally:
        form_on.cache_clear()


def test_chunked(checkpoint, expected):
    engine = engine_for(checkpoint, max_prefill_token_num=16, max_batch_size=8)
    assert all_at_once(engine) == expected


def test_preempted_on_purpose(checkpoint, expected):
    engine = engine_for(checkpoint)
    assert all_at_once(engine, preempt_every=3) == expected
    assert engine.scheduler.stats.num_preemptions > 5


def test_preempted_for_want_of_blocks(checkpoint, expected):
    engine = engine_for(checkpoint, cache_max_entry_count=17)
    assert all_at_once(engine) == expected
    assert engine.scheduler.stats.num_preemptions > 0


def test_from_the_prefix_cache(checkpoint, expected):
    engine = engine_for(checkpoint)
    assert all_at_once(engine) == expected
    assert all_at_once(engine) == expected
    assert engine.scheduler.stats.num_cached_tokens > 64


@pytest.mark.parametrize(("quant_policy", "tolerance"), [(8, 0.1), (4, 1.5)])
def test_quantized_kv_cache(quant_policy, tolerance):
    """The bundled model's log-probability of its next word, after some that were read back."""
    texts = [[300 + 7 * i + j for j in range(20)] for i in range(5)]
    found = []
    for policy in (0, quant_policy):
        engine = engine_for(DEMO, quant_policy=policy, max_prefill_token_num=16, max_batch_size=4)
        assert engine.runner.info.kv_bits == (policy or 32)
        for i, text in enumerate(texts):
            sampling = SamplingParams(temperature=0.0, max_tokens=1, logprobs=5)
            engine.add_request(Request(str(i), text, sampling))
        outputs = []
        while engine.has_work():
            outputs += engine.step()
        found.append({o.request_id: dict(o.logprobs[0].top) for o in outputs})
    for name, plain in found[0].items():
        best = max(plain, key=plain.__getitem__)
        assert abs(found[1][name][best] - plain[best]) < tolerance
    assert found[0] != found[1]


def test_joining_and_leaving(checkpoint, expected):
    """Requests that come one a step, while others are aborted, answer as if alone."""
    engine = engine_for(checkpoint, max_batch_size=4)
    replies: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts()):
        engine.add_request(made(i, prompt))
        engine.add_request(made(100 + i, prompt[::-1]))
        for output in engine.step():
            replies.setdefault(int(output.request_id), []).extend(output.token_ids)
        engine.abort_request(str(100 + i))
    while engine.has_work():
        for output in engine.step():
            replies.setdefault(int(output.request_id), []).extend(output.token_ids)
    assert [replies[i] for i in range(len(expected))] == expected


def test_a_further_rank_that_cannot_load_says_why(tmp_path):
    """Told once, as rank 0's own words are, instead of dying and being started over and over."""
    make_checkpoint(tmp_path, "qwen2")
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"][-1] = torch.nan  # a row that only rank 1 reads
    save_file(weights, tmp_path / "model.safetensors")

    async def test() -> AsyncEngine:
        engine = AsyncEngine(EngineConfig(model=str(tmp_path), device="cpu", tp=2))
        await engine.start()
        try:
            with pytest.raises(UserError, match="lm_head.weight contains NaN"):
                await engine.wait_ready()
        finally:
            await engine.stop()
        return engine

    assert asyncio.run(asyncio.wait_for(test(), 120)).epoch == 1


def test_ranks_on_a_cpu_share_its_memory(checkpoint, monkeypatch):
    class Two(ParallelContext):
        """The first of two ranks, alone."""

        def all_gather(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x], dim=-1)

    monkeypatch.setattr("backend.engine.kv_cache.free_memory", lambda device: 1 << 20)
    config = EngineConfig(model=str(checkpoint), dtype="float32", device="cpu", tp=2)
    info = ModelRunner(config, Two(0, 2)).info
    pool = info.num_blocks * info.block_size * info.kv_bytes_per_token
    assert (1 << 19) < pool <= 0.8 * (1 << 20)


def test_two_ranks(checkpoint, expected, tmp_path, monkeypatch):
    """tp 2: two processes over gloo, each with half of the heads."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    async def test() -> list[list[int]]:
        config = EngineConfig(
            model=str(checkpoint), dtype="float32", device="cpu", session_len=128, tp=2
        )
        engine = AsyncEngine(config)
        await engine.start()
        try:
            await engine.wait_ready()

            async def reply(index: int, prompt: list[int]) -> list[int]:
                stream = engine.generate(made(index, prompt))
                return [token async for output in stream for token in output.token_ids]

            return await asyncio.gather(*(reply(i, p) for i, p in enumerate(prompts())))
        finally:
            await engine.stop()

    assert asyncio.run(asyncio.wait_for(test(), 300)) == expected
    assert not list(tmp_path.iterdir()), "the ranks' meeting place was left behind"
