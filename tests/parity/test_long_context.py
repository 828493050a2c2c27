"""Texts longer than the trained length: dynamic NTK in steps, Qwen's formula, log n, longrope.

The references are transformers' own models: at a step's bound dynamic NTK is its formula, and
elsewhere its plain model with the base that the step has, over the whole text without a cache.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from backend.config import EngineConfig, SamplingParams
from backend.engine.engine import Engine
from backend.engine.types import Request
from backend.engine.worker import build_engine
from backend.errors import UserError
from backend.layers.parallel import ParallelContext
from backend.layers.rotary import RopeParameters, length_bounds
from backend.models.loader import load_model
from backend.models.long_context import LongContext
from backend.models.registry import read_model_config
from tests.family_layouts import make_family
from tests.parity.test_decode_steps import as_on_a_gpu, triton_ops  # noqa: F401
from tests.parity.test_logits import CPU, LONGROPE, check, ids_of, paged_logits
from tests.tiny_model import make_checkpoint
from tests.unit.test_awq import edit_config

TRAINED = 32
DYNAMIC = dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0)
LADDER = {"dynamic": (32, 48, 64, 96, 128), "qwen": (32, 64, 128)}


def stretch(kind: str, length: int, factor: float) -> float:
    """What the base is raised by, as the papers' and Qwen's code have it."""
    bound = next(bound for bound in LADDER[kind] if bound >= length)
    if kind == "qwen":
        return max(2 ** math.ceil(math.log2(bound / TRAINED) + 1) - 1, 1)
    return factor * bound / TRAINED - (factor - 1)


class Reference:
    """A transformers model whose base follows the text's length, with Qwen's log n or without."""

    def __init__(self, model: PreTrainedModel, kind: str, factor: float, logn: bool) -> None:
        self.model, self.kind, self.factor = model, kind, factor
        self.rotary = model.model.rotary_emb
        if logn:
            for layer in model.model.layers:
                layer.self_attn.q_proj.register_forward_hook(self.scale)

    @staticmethod
    def scale(module: torch.nn.Module, inputs: object, queries: torch.Tensor) -> torch.Tensor:
        places = range(1, queries.shape[1] + 1)
        by = [math.log(place, TRAINED) if place > TRAINED else 1.0 for place in places]
        return queries * torch.tensor(by)[None, :, None]

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> torch.Tensor:
        size = 2 * len(self.rotary.inv_freq)
        base = 10000.0 * stretch(self.kind, len(ids), self.factor) ** (size / (size - 2))
        self.rotary.inv_freq = 1.0 / base ** (torch.arange(0, size, 2).float() / size)
        return self.model(torch.tensor([ids])).logits[0]

    def reply(self, ids: list[int], count: int) -> list[int]:
        ids = list(ids)
        for _ in range(count):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[-count:]


def made(folder: Path, kind: str) -> Reference:
    """A checkpoint that declares what it does beyond its length, and its reference."""
    if kind == "qwen":
        model = make_family(folder, "qwen")
        edit_config(folder, seq_length=TRAINED)
        return Reference(model, "qwen", 1.0, logn=True)
    model = make_checkpoint(
        folder, "llama", rope_parameters=dict(DYNAMIC), max_position_embeddings=TRAINED
    )
    plain = make_checkpoint(folder / "plain", "llama", max_position_embeddings=TRAINED)
    plain.load_state_dict(model.state_dict())
    return Reference(plain, "dynamic", 2.0, logn=False)


PROMPTS = [ids_of(length, seed).tolist() for seed, length in enumerate((20, 31, 32, 33, 45, 70))]
PROMPTS.append(PROMPTS[5][:60] + PROMPTS[0])
TOKENS = 36  # every prompt crosses a bound, some two


@pytest.fixture(scope="module", params=["dynamic", "qwen"])
def model(request, tmp_path_factory) -> tuple[Path, list[list[int]]]:
    """A checkpoint, and what its reference says to PROMPTS."""
    folder = tmp_path_factory.mktemp(request.param)
    reference = made(folder, request.param)
    return folder, [reference.reply(prompt, TOKENS) for prompt in PROMPTS]


def engine_for(folder: Path, **options) -> Engine:
    settings = dict(dtype="float32", device="cpu", session_len=128, cache_block_seq_len=8)
    return build_engine(EngineConfig(model=str(folder), **{**settings, **options}))


def replies(
    engine: Engine, prompts: list[list[int]], preempt_every: int = 0, tokens: int = TOKENS
) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        engine.add_request(Request(str(index), prompt, sampling))
    steps = 0
    while engine.has_work():
        for output in engine.step():
            found.setdefault(int(output.request_id), []).extend(output.token_ids)
        steps += 1
        running = engine.scheduler.running
        if preempt_every and running and steps % preempt_every == 0:
            engine.scheduler.preempt(next(iter(running.values())))
    return [found[index] for index in sorted(found)]


def test_alone(model):
    folder, expected = model
    engine = engine_for(folder, enable_prefix_caching=False)
    assert [replies(engine, [prompt])[0] for prompt in PROMPTS] == expected


def test_together_then_from_the_cache(model):
    folder, expected = model
    engine = engine_for(folder)
    assert replies(engine, PROMPTS) == expected
    computed = engine.stats().num_cached_tokens
    assert replies(engine, PROMPTS) == expected
    assert engine.stats().num_cached_tokens > computed
    # Second turns: what replies have left behind, whose first blocks were of shorter steps.
    turns = [prompt + reply[:20] for prompt, reply in zip(PROMPTS, expected)]
    again = replies(engine, turns)
    assert [reply[: TOKENS - 20] for reply in again] == [reply[20:] for reply in expected]


@pytest.mark.parametrize(
    "options", [dict(max_prefill_token_num=16, max_batch_size=8), dict(kv_cache_tokens=160)]
)
def test_chunked_or_short_of_blocks(model, options):
    folder, expected = model
    assert replies(engine_for(folder, **options), PROMPTS) == expected


def test_preempted(model):
    folder, expected = model
    engine = engine_for(folder)
    assert replies(engine, PROMPTS, preempt_every=5) == expected
    assert engine.stats().num_preemptions > 5


@pytest.mark.parametrize("length", [48, 64, 96, 128])
def test_dynamic_ntk_is_transformers_at_a_bound(tmp_path, length):
    model = make_checkpoint(
        tmp_path, "llama", rope_parameters=dict(DYNAMIC), max_position_embeddings=TRAINED
    )
    ids = ids_of(length)
    # However long a conversation might become, and in pieces too.
    check(model, tmp_path, ids, [20, 40, length], scattered=True, session_len=length)
    check(model, tmp_path, ids, [length], scattered=False, session_len=1000)
    check(model, tmp_path, ids[:30], [30], scattered=False, session_len=1000)


@pytest.mark.parametrize("length", [30, 33, 60, 65, 128])
def test_qwen_s_logits(tmp_path, length):
    reference = made(tmp_path, "qwen")
    ids = ids_of(length)
    logits = paged_logits(tmp_path, ids, [20, length], scattered=True, session_len=128)
    torch.testing.assert_close(logits, reference.logits(ids.tolist()), atol=1e-4, rtol=0)


def test_longrope_goes_by_the_text_and_not_by_the_session(tmp_path):
    model = make_checkpoint(
        tmp_path, "llama", rope_parameters=dict(LONGROPE), max_position_embeddings=128
    )
    for length in (60, 64, 65, 100):
        check(model, tmp_path, ids_of(length), [40, length], scattered=True, session_len=128)


def test_a_setting_is_as_good_as_the_checkpoint_s_word(tmp_path):
    """A plain model told to stretch is the model that says so; and one that says so can be told
    not to."""
    makes = dict(max_position_embeddings=TRAINED)
    make_checkpoint(tmp_path / "dynamic", "llama", rope_parameters=dict(DYNAMIC), **makes)
    make_checkpoint(tmp_path / "plain", "llama", **makes)
    factors = dict(dynamic=None, plain=2.0)
    said = [
        replies(engine_for(tmp_path / name, rope_scaling_factor=factor), PROMPTS)
        for name, factor in factors.items()
    ]
    assert said[0] == said[1]
    factors = dict(dynamic=0.0, plain=None)
    unsaid = [
        replies(engine_for(tmp_path / name, rope_scaling_factor=factor), PROMPTS)
        for name, factor in factors.items()
    ]
    assert unsaid[0] == unsaid[1] != said[0]


def test_log_n_of_any_family(tmp_path):
    model = make_checkpoint(tmp_path, "llama", max_position_embeddings=TRAINED)
    reference = Reference(model, "dynamic", 1.0, logn=True)
    engine = engine_for(tmp_path, rope_scaling_factor=1.0, use_logn_attn=True)
    assert replies(engine, PROMPTS) == [reference.reply(prompt, TOKENS) for prompt in PROMPTS]
    assert engine.runner.info.rope_bounds == LADDER["dynamic"]


@pytest.mark.parametrize("kind", ["linear", "longrope"])
def test_no_two_stretches_at_once(tmp_path, kind):
    rope = dict(LONGROPE) if kind == "longrope" else dict(rope_type=kind, factor=2.0)
    make_checkpoint(tmp_path, "llama", rope_parameters=rope)
    with pytest.raises(UserError, match=f"rope type {kind}, which dynamic NTK cannot be added to"):
        read_model_config(str(tmp_path), LongContext(1.0))
    plain = read_model_config(str(tmp_path))
    assert read_model_config(str(tmp_path), LongContext(0.0, False)) == plain


@pytest.mark.parametrize("trained", [1, 7, 2048])
@pytest.mark.parametrize("session_len", [1, 2048, 2049, 3072, 3073, 100_000])
@pytest.mark.parametrize("kind", ["default", "dynamic", "qwen_dynamic"])
def test_the_last_step_holds_the_session(kind, trained, session_len):
    bounds = length_bounds(RopeParameters(kind, factor=1.0), trained, session_len)
    assert list(bounds) == sorted(bounds) and bounds[-1] >= session_len
    assert len(bounds) == 1 or bounds[-2] < session_len
    if kind != "default":
        assert bounds[0] == trained and len(bounds) < 40
        assert all(b <= 2 * max(a, 1) for a, b in zip(bounds, bounds[1:]))


def test_a_gpu_s_way(tmp_path, triton_ops):  # noqa: F811
    """Its kernels interpreted, a step ahead, the steps' numbers in the graphs' buffers."""
    reference = made(tmp_path, "qwen")
    engine = engine_for(tmp_path, max_batch_size=2, max_prefill_token_num=64, kv_cache_tokens=512)
    as_on_a_gpu(engine, max_blocks=16)
    prompts = [PROMPTS[1], PROMPTS[2][:9]]  # the first crosses a bound
    expected = [reference.reply(prompt, 4) for prompt in prompts]
    assert replies(engine, prompts, tokens=4) == expected


def test_two_ranks(tmp_path):
    """Further ranks get the steps with the batch."""
    reference = made(tmp_path, "qwen")
    engine = engine_for(tmp_path, tp=2)
    try:
        prompts = PROMPTS[1:3]
        assert replies(engine, prompts) == [reference.reply(prompt, TOKENS) for prompt in prompts]
    finally:
        engine.runner.close()


def test_half_precision_scales_queries_in_their_format(tmp_path):
    made(tmp_path, "qwen")
    decoder, _ = load_model(str(tmp_path), torch.bfloat16, CPU, ParallelContext(), 128)
    scale = decoder.rotary(torch.arange(128)).query_scale
    assert scale.dtype == torch.bfloat16 and scale.shape == (128, 1, 1)
    assert scale[:32].eq(1).all() and scale[32:].gt(1).any() and scale.diff(dim=0).ge(0).all()
