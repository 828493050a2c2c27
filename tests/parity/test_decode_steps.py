"""What only a GPU's engine does, played on a CPU: its kernels interpreted, its steps one ahead.

Tokens stay "on the device", block tables and lengths go there by `DecodeSteps`, prompts are padded
by `PromptSteps`; graphs alone are left out. The replies must be those of the CPU's own way.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backend.config import EngineConfig, SamplingParams
from backend.engine.cuda_graph import DecodeSteps
from backend.engine.engine import Engine
from backend.engine.model_runner import Launched
from backend.engine.prompt_steps import PromptSteps
from backend.engine.types import Request, SampledToken
from backend.engine.worker import build_engine
from kernels import dispatch
from tests.tiny_model import make_checkpoint

PROMPTS = [[5, 6, 7], list(range(20, 39)), [9], list(range(100, 111)), [3, 3], [4, 5, 6, 7]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_checkpoint(folder, "llama")
    return folder


@pytest.fixture
def triton_ops(monkeypatch):
    monkeypatch.setitem(dispatch.OWN_FORMS, "cpu", "kernels.gpu")
    dispatch.form_on.cache_clear()
    yield
    dispatch.form_on.cache_clear()


def as_on_a_gpu(engine: Engine, max_blocks: int) -> None:
    """Let an engine on a CPU run as on a GPU, but for graphs."""
    runner = engine.runner
    runner.max_ahead = 1
    runner._fetch = lambda count: Launched(
        [SampledToken(token) for token in runner._last_drawn[:count].tolist()]
    )
    for cache in runner.kv_caches:  # a slot that was not written must not matter
        cache.k.fill_(torch.nan)
        cache.v.fill_(torch.nan)
    runner._decode_steps = DecodeSteps(
        runner._logits, runner._last_drawn, vocab_size=runner.info.vocab_size,
        block_size=runner.block_size, max_blocks=max_blocks, batch_invariant=False, capture=False,
    )  # fmt: skip
    runner._prompt_steps = PromptSteps(
        runner.model, runner.kv_caches, 16, runner.device, capture=False
    )


def engine_of(folder: Path) -> Engine:
    config = EngineConfig(
        model=str(folder), dtype="float32", device="cpu", session_len=64, cache_block_seq_len=8,
        kv_cache_tokens=160, max_prefill_token_num=16, max_batch_size=5,
    )  # fmt: skip
    return build_engine(config)


def replies(engine: Engine) -> dict[str, list[int]]:
    """Greedy and drawn ones; one with penalties, one with log-probabilities, one that stops."""
    kinds = [
        dict(temperature=0.0), dict(temperature=0.0, logprobs=1), dict(temperature=1.0, seed=4),
        dict(temperature=0.0, frequency_penalty=0.7), dict(temperature=0.9, top_k=5, seed=1),
        dict(temperature=0.0, stop_token_ids=(186, 8, 252, 37)),
    ]  # fmt: skip
    found: dict[str, list[int]] = {}
    for i, (prompt, kind) in enumerate(zip(PROMPTS, kinds, strict=True)):
        sampling = SamplingParams(max_tokens=7 + i, ignore_eos=True, **kind)
        engine.add_request(Request(str(i), prompt, sampling))
    while engine.has_work():
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
    stats = engine.stats()
    assert stats.num_blocks_free + stats.num_blocks_cached == 20
    return found


def test_the_gpus_way_gives_the_cpus_replies(checkpoint, triton_ops):
    ahead = engine_of(checkpoint)
    as_on_a_gpu(ahead, max_blocks=8)
    found = [replies(ahead), replies(ahead)]  # the second from cached prefixes
    dispatch.OWN_FORMS["cpu"] = "kernels.cpu"
    dispatch.form_on.cache_clear()
    expected = replies(engine_of(checkpoint))
    assert found == [expected, expected]
