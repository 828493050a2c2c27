"""Steps on a GPU: graphs, run ahead, batch invariance, quantized KV, too little memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from backend.config import EngineConfig, SamplingParams
from backend.engine.engine import Engine
from backend.engine.types import Request, StepOutput
from backend.engine.worker import build_engine
from tests.tiny_model import make_checkpoint
from tests.unit.test_awq import quantize_checkpoint

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo_model"


def engine_of(folder: Path, **options) -> Engine:
    settings = dict(
        device="cuda", session_len=256, cache_block_seq_len=16, kv_cache_tokens=8192,
        max_prefill_token_num=64, max_batch_size=64, enable_prefix_caching=False,
    )  # fmt: skip
    return build_engine(EngineConfig(model=str(folder), **{**settings, **options}))


def prompts(count: int, longest: int = 150) -> list[list[int]]:
    source = random.Random(5)
    return [
        [source.randrange(256) for _ in range(1 + source.randrange(longest))] for _ in range(count)
    ]


def run(engine: Engine, texts: list[list[int]], **sampling) -> list[list[StepOutput]]:
    """All outputs of each prompt's request, the requests together in the engine."""
    settings = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True, **sampling}
    outputs: list[list[StepOutput]] = [[] for _ in texts]
    for i, prompt in enumerate(texts):
        engine.add_request(Request(str(i), prompt, SamplingParams(**settings)))
    while engine.has_work():
        for output in engine.step():
            outputs[int(output.request_id)].append(output)
    return outputs


def tokens(outputs: list[list[StepOutput]]) -> list[list[int]]:
    return [[token for output in one for token in output.token_ids] for one in outputs]


def reports(outputs: list[list[StepOutput]]) -> list[list[tuple]]:
    """Tokens with the log-probabilities of the likeliest, to the bit."""
    return [
        [(item.token_id, item.logprob, tuple(item.top)) for o in one for item in o.logprobs or ()]
        for one in outputs
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_checkpoint(folder, "llama", hidden_size=256, intermediate_size=512, num_hidden_layers=3)
    return folder


@pytest.fixture(scope="module")
def awq_checkpoint(checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("awq")
    make_checkpoint(folder, "llama", hidden_size=256, intermediate_size=512, num_hidden_layers=3)
    quantize_checkpoint(folder, group_size=64)
    return folder


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "awq"])
@pytest.mark.parametrize("quant_policy", [0, 8])
def test_graphs_change_no_bit(checkpoint, awq_checkpoint, kind, quant_policy):
    folder = awq_checkpoint if kind == "awq" else checkpoint
    options = dict(dtype="float16" if kind == "awq" else kind, quant_policy=quant_policy)
    texts = prompts(11)
    graphs, eager = (
        reports(run(engine_of(folder, eager_mode=e, **options), texts, logprobs=5))
        for e in (False, True)
    )
    assert graphs == eager and all(len(one) == 20 for one in graphs)


@pytest.mark.parametrize("kind", ["float16", "awq"])
@pytest.mark.parametrize("quant_policy", [0, 8])
def test_batch_invariant_replies_are_the_same_alone_and_among_64(
    checkpoint, awq_checkpoint, kind, quant_policy
):
    folder = awq_checkpoint if kind == "awq" else checkpoint
    engine = engine_of(folder, dtype="float16", batch_invariant=True, quant_policy=quant_policy)
    texts = prompts(64)
    together = reports(run(engine, texts, logprobs=5))
    for i in (0, 1, 17, 40, 63):
        assert reports(run(engine, texts[i : i + 1], logprobs=5)) == together[i : i + 1]


def test_tokens_drawn_on_the_device_are_those_drawn_by_the_host(checkpoint):
    """With log-probabilities asked for, the host draws, step by step; else the device, ahead."""
    engine = engine_of(checkpoint, dtype="float16", batch_invariant=True)
    texts = prompts(16)
    for sampling in (
        dict(temperature=0.0),
        dict(temperature=1.0, top_p=1.0, seed=3),
        dict(temperature=0.8, top_p=0.7, seed=4),
        dict(temperature=1.2, top_k=5, min_p=0.05, seed=5),
    ):
        assert tokens(run(engine, texts, **sampling)) == tokens(
            run(engine, texts, logprobs=0, **sampling)
        )


def test_a_stop_that_comes_while_the_next_step_runs(checkpoint):
    engine = engine_of(checkpoint, dtype="float16", batch_invariant=True)
    texts = prompts(12)
    whole = tokens(run(engine, texts))
    stop = whole[3][7]
    for found, reply in zip(tokens(run(engine, texts, stop_token_ids=(stop,))), whole):
        expected = reply[: reply.index(stop) + 1] if stop in reply else reply
        assert found == expected
    stats = engine.stats()
    assert stats.num_blocks_free + stats.num_blocks_cached == engine.runner.info.num_blocks


@pytest.mark.parametrize(("quant_policy", "tolerance"), [(8, 0.1), (4, 1.5)])
def test_quantized_kv_stays_near(quant_policy, tolerance):
    """The bundled model's first words, log-probabilities against the 16-bit cache's."""
    texts = prompts(6, longest=120)
    plain, quantized = (
        run(engine_of(DEMO, dtype="float16", quant_policy=q), texts, logprobs=0, max_tokens=2)
        for q in (0, quant_policy)
    )
    pairs = list(zip(reports(quantized), reports(plain), strict=True))
    alike = [(ours[0], theirs[0]) for ours, theirs in pairs if ours[0][0] == theirs[0][0]]
    assert len(alike) >= 4
    assert all(abs(ours[1] - theirs[1]) < tolerance for ours, theirs in alike)


def test_the_pool_in_tokens_and_in_gb():
    by_tokens = engine_of(DEMO, kv_cache_tokens=1000).runner.info
    assert by_tokens.num_blocks == 63
    by_gb = engine_of(DEMO, kv_cache_tokens=None, kv_cache_gb=0.01).runner.info
    taken = by_gb.num_blocks * by_gb.block_size * by_gb.kv_bytes_per_token
    assert 0.0095e9 < taken <= 0.01e9


@contextmanager
def little_memory(size: int) -> Iterator[None]:
    """PyTorch has some `size` bytes left, whatever tests before this one have left behind."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + size) / total)
    held, piece = [], 2 << 20
    try:
        with suppress(torch.OutOfMemoryError):
            while True:
                held.append(torch.empty(piece, dtype=torch.uint8, device="cuda"))
        del held[-(size // piece) :]
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_out_of_memory_in_a_step_shrinks_it_and_loses_nothing():
    texts = prompts(8, longest=240)
    engine = engine_of(DEMO, dtype="float16", max_prefill_token_num=2048, batch_invariant=True)
    expected = tokens(run(engine, texts))
    with little_memory(2 << 20):
        assert tokens(run(engine, texts)) == expected
        assert engine.scheduler.max_step_tokens < 2048
