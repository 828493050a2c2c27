"""config.ini's settings do in the engine what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend.config import EngineConfig, SamplingParams
from backend.engine.engine import Engine
from backend.engine.types import Request
from backend.engine.worker import build_engine
from backend.workspace.convert import convert
from backend.workspace.keys import KEYS
from backend.workspace.layout import CONFIG_INI, workspace_of
from backend.workspace.settings import engine_options
from tests.tiny_model import make_checkpoint


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """Of a model trained for 256 tokens."""
    folder = tmp_path_factory.mktemp("keys")
    make_checkpoint(folder / "model", "llama")
    return convert("tiny", folder / "model", folder / "workspace")


@pytest.fixture
def engine(workspace):
    """Builds an engine by config.ini with these values in it, and these flags."""
    path = workspace / CONFIG_INI
    before = path.read_text()
    built: list[Engine] = []

    def build(values: dict[str, object], **flags) -> Engine:
        path.write_text(before + "".join(f"# {key}\n" for key in values))
        lines = [
            f"{key} = {values[key]}" if (key := line.split(" ")[0]) in values else line
            for line in path.read_text().splitlines()
        ]
        path.write_text("\n".join(lines) + "\n")
        given = {"dtype": "float32", "device": "cpu", **flags}
        options = {**engine_options(str(workspace), given), **given}
        built.append(build_engine(EngineConfig(model=str(workspace_of(workspace)), **options)))
        return built[-1]

    yield build
    path.write_text(before)
    for made in built:
        made.runner.close()


@pytest.mark.parametrize(
    ("values", "name", "expected"),
    [
        ({"quant_policy": 0}, "kv_bits", 32),
        ({"quant_policy": 4}, "kv_bits", 8),
        ({"quant_policy": 8}, "kv_bits", 8),
        ({"kv_cache_dtype": "int4"}, "kv_bits", 4),
        ({"kv_cache_dtype": "int8"}, "kv_bits", 8),
        ({"session_len": 100}, "session_len", 100),
        ({"max_batch_size": 3}, "max_batch_size", 3),
        ({"cache_max_entry_count": 7}, "num_blocks", 7),
        ({"cache_block_seq_len": 16}, "block_size", 16),
        ({"session_len": 600, "rope_scaling_factor": 1.0}, "rope_bounds", (256, 384, 512, 768)),
        ({"session_len": 600, "rope_scaling_factor": 0.0}, "rope_bounds", (600,)),
        ({"tensor_para_size": 1}, "tp", 1),
    ],
)
def test_what_the_engine_becomes(engine, values, name, expected):
    assert getattr(engine(values).runner.info, name) == expected


@pytest.mark.parametrize("switch", [0, 1])
def test_log_n(engine, switch):
    rotary = engine({"use_logn_attn": switch, "session_len": 300}).runner.model.rotary
    assert (rotary._logn_dtype is not None) == bool(switch)


def test_a_share_of_the_memory(engine, monkeypatch):
    monkeypatch.setattr("backend.engine.kv_cache.free_memory", lambda device: 10_000_000)
    half, quarter = (
        engine({"cache_max_entry_count": share}).runner.info.num_blocks for share in (0.5, 0.25)
    )
    assert half // 2 == quarter > 10


@pytest.mark.parametrize(
    ("values", "flags", "steps"),
    [
        ({"max_context_token_num": 1}, {}, 1),  # a whole conversation of 256
        ({"max_context_token_num": 1, "session_len": 50}, {"session_len": 256}, 1),
        ({"max_context_token_num": 2, "max_batch_size": 1}, {"max_batch_size": 2}, 1),
        ({"max_context_token_num": 50, "max_batch_size": 4}, {}, 4),
        ({"max_context_token_num": 1, "num_tokens_per_iter": 100}, {"max_batch_size": 4}, 2),
    ],
)
def test_tokens_that_a_step_computes(engine, values, flags, steps):
    made = engine(values, **flags)
    made.add_request(Request("0", [7] * 199, SamplingParams(max_tokens=1)))
    while made.has_work():
        made.step()
    assert made.stats().num_steps == steps


def test_sequences_that_run_at_the_same_time(engine):
    made = engine({"max_batch_size": 2})
    for name in "abc":
        made.add_request(Request(name, [5, 6], SamplingParams(max_tokens=4, ignore_eos=True)))
    most = 0
    while made.has_work():
        made.step()
        most = max(most, made.stats().num_running)
    assert most == 2


def test_keys_without_effect_have_none(engine, workspace):
    legacy = [key.name for key in KEYS.values() if key.kind == "legacy"]
    assert {"step_length", "use_context_fmha", "cache_chunk_size"} <= set(legacy)
    plain = engine({}).runner.info
    assert engine(dict.fromkeys(legacy, 5)).runner.info == plain
