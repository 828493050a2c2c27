"""The engine on a GPU: every family, every number format, further ranks, memory."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from backend.config import EngineConfig, SamplingParams
from backend.engine.async_engine import AsyncEngine
from backend.engine.types import Request
from backend.engine.worker import build_engine
from tests.tiny_model import FAMILIES, make_checkpoint

TOKENS = 24
DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo_model"


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(0, 256, (length,), generator=generator).tolist() for length in (5, 40, 17, 1)
    ]


def generate(folder: Path, dtype: torch.dtype, device: str) -> list[list[int]]:
    """What transformers says to each prompt, alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    replies = []
    for prompt in prompts():
        ids = torch.tensor([prompt], device=device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False,
            temperature=None, top_p=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        replies.append(out[0, len(prompt) :].tolist())
    return replies


def made(index: int, prompt: list[int], **sampling) -> Request:
    settings = {"temperature": 0.0, "max_tokens": TOKENS, **sampling}
    return Request(str(index), prompt, SamplingParams(**settings))


def config(folder: Path, **options) -> EngineConfig:
    settings = dict(
        dtype="float32", device="cuda", session_len=128, cache_block_seq_len=8,
        cache_max_entry_count=200, max_prefill_token_num=16, max_batch_size=8,
    )  # fmt: skip
    return EngineConfig(model=str(folder), **{**settings, **options})


async def replies_of(settings: EngineConfig) -> list[list[int]]:
    engine = AsyncEngine(settings)
    await engine.start()
    try:
        await engine.wait_ready()

        async def reply(index: int, prompt: list[int]) -> list[int]:
            stream = engine.generate(made(index, prompt))
            return [token async for output in stream for token in output.token_ids]

        return await asyncio.gather(*(reply(i, p) for i, p in enumerate(prompts())))
    finally:
        await engine.stop()


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make_checkpoint(folder, request.param)
    return folder


def test_greedy_text_in_float32(checkpoint):
    """Batched and chunked on the GPU, in a child process; alone by transformers on the CPU."""
    expected = generate(checkpoint, torch.float32, "cpu")
    assert asyncio.run(replies_of(config(checkpoint))) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_errs_no_more_than_transformers(checkpoint, dtype):
    """The likeliest first tokens' log-probabilities, against transformers' in float32."""
    engine = build_engine(config(checkpoint, dtype=dtype, cache_max_entry_count=100))
    exact, half = (
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=d).to("cuda").eval()
        for d in (torch.float32, getattr(torch, dtype))
    )
    ours = theirs = 0.0
    for i, prompt in enumerate(prompts()):
        engine.add_request(made(i, prompt, max_tokens=1, logprobs=20))
        outputs = []
        while engine.has_work():
            outputs += engine.step()
        assert outputs[0].logprobs is not None
        ids = torch.tensor([prompt], device="cuda")
        with torch.inference_mode():
            a, b = (m(ids).logits[0, -1].float().log_softmax(-1) for m in (exact, half))
        theirs = max(theirs, float((a - b).abs().max()))
        for token, value in outputs[0].logprobs[0].top:
            ours = max(ours, abs(value - float(a[token])))
    assert ours <= 2 * theirs


@pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
def test_the_bundled_model_answers(dtype):
    """The demo model's own dtype and others give transformers' words, up to a late difference."""
    expected = generate(DEMO, torch.float32, "cuda")
    settings = config(DEMO, dtype=dtype, session_len=None, max_prefill_token_num=2048)
    replies = asyncio.run(replies_of(settings))
    if dtype == "float32":
        assert replies == expected
    assert sum(a[0] == b[0] for a, b in zip(replies, expected)) >= 3


def test_the_cache_takes_its_share_of_free_memory():
    free = torch.cuda.mem_get_info()[0]
    runner = build_engine(
        config(DEMO, cache_max_entry_count=0.01, session_len=2048, max_batch_size=4096)
    ).runner
    info = runner.info
    taken = info.num_blocks * info.block_size * info.kv_bytes_per_token
    assert 0.005 * free < taken < 0.0105 * free
    assert "NVIDIA" in info.device


if torch.cuda.device_count() > 1:

    def test_two_gpus(checkpoint):
        """tp 2 over NCCL."""
        expected = generate(checkpoint, torch.float32, "cpu")
        assert asyncio.run(replies_of(config(checkpoint, tp=2))) == expected
