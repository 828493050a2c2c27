"""The bundled model is what its card says."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from assets.demo_model.exam.answer_by_engine import EngineReader
from assets.demo_model.exam.exam import examine, load_questions

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo_model"
CALIBRATION = DEMO.parent / "calibration"


def test_size_and_shape():
    shards = sorted(DEMO.glob("*.safetensors"))
    assert sum(s.stat().st_size for s in shards) <= 30_000_000
    assert all(s.stat().st_size <= 15_000_000 for s in shards)
    config = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] == 2048 and config["vocab_size"] <= 8192
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():
                shape = file.get_slice(name).get_shape()
                assert len(shape) == 1 or all(size % 128 == 0 for size in shape), name


def test_it_passes_its_exam():
    """By our engine, greedy; float32, so that every machine gives the same answers."""
    reader = EngineReader(DEMO, max_tokens=160, dtype="float32")
    verdicts = examine(load_questions(), reader.answer_all, show=lambda line: None)
    assert sum(not verdict.failures for verdict in verdicts) >= 160


def test_calibration_text():
    texts = [p for p in CALIBRATION.glob("*.txt") if not p.name.startswith("heldout")]
    sizes = {
        zh: sum(p.stat().st_size for p in texts if p.name.startswith("zh") is zh)
        for zh in (False, True)
    }
    assert sizes[False] >= 1_000_000 and sizes[True] >= 100_000
    assert sum(sizes.values()) <= 3_000_000
    assert {p.name for p in CALIBRATION.glob("heldout*.txt")} == {
        "heldout_en.txt",
        "heldout_zh.txt",
    }
