"""Scales of K and V in a workspace: our own files, and LMDeploy's that people copy in."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest
import torch

from backend.config import EngineConfig
from backend.engine.worker import build_engine
from backend.errors import UserError
from backend.layers.parallel import ParallelContext
from backend.models.kv_params import read_kv_params, stored_params
from backend.models.registry import read_model_config
from backend.workspace.convert import convert
from backend.workspace.layout import WEIGHTS, verify
from quantize.kv_qparams import write_kv_qparams
from tests.tiny_model import make_checkpoint


@pytest.fixture
def source(tmp_path) -> Path:
    make_checkpoint(tmp_path / "model", "llama")
    return tmp_path / "model"


@pytest.mark.parametrize("tp", [1, 2])
def test_scales_of_the_kv_cache(source, tp):
    """As `lite kv_qparams` writes them: a file a layer and rank, to be copied and deleted."""
    workspace = convert("tiny", source, source.parent / "workspace", tp=tp)
    generator = torch.Generator().manual_seed(1)
    low = [-torch.rand(2, 16, generator=generator) for _ in range(2)]
    ranges = [(part, part + 1) for part in low]
    folder = workspace / WEIGHTS
    assert write_kv_qparams(folder, ranges, ranges, num_tp=2) == folder
    write_kv_qparams(source, ranges, ranges)
    names = [f"layers.{layer}.past_kv_scale.{rank}.weight" for layer in (0, 1) for rank in (0, 1)]
    assert sorted(path.name for path in folder.glob("*past_kv*")) == names
    config = read_model_config(str(workspace))
    for rank in range(tp):
        parallel = ParallelContext(rank, tp)
        found = read_kv_params(str(workspace), config, parallel)
        assert torch.equal(found, read_kv_params(str(source), config, parallel))
    verify(workspace)  # they are none of the manifest's
    with pytest.raises(UserError, match="past_kv_scale.0.weight is there already"):
        write_kv_qparams(workspace, ranges, ranges)
    write_kv_qparams(workspace, ranges, ranges, overwrite=True)
    assert sorted(path.name for path in folder.glob("*past_kv*")) == names[::2]
    (folder / names[0]).unlink()
    with pytest.raises(UserError, match="does not fit this model"):
        read_kv_params(str(workspace), config, ParallelContext())
    (folder / names[2]).unlink()
    assert stored_params(workspace) is None


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("numbers", [(0.02, 0.5, 0.03, -0.25), (0.02, 0.03)])
def test_lmdeploy_s_own_files_of_kv_scales(source, tp, numbers, caplog):
    """Raw float32, asymmetric or not, for all heads of a rank; q is 128 where x is the zero."""
    workspace = convert("tiny", source, source.parent / "workspace", tp=tp)
    config = read_model_config(str(workspace))
    for layer in (0, 1):
        for rank in range(tp):
            path = workspace / WEIGHTS / f"layers.{layer}.past_kv_scale.{rank}.weight"
            path.write_bytes(struct.pack(f"<{len(numbers)}f", *numbers))
    verify(workspace)
    for rank in range(tp):
        found = read_kv_params(str(workspace), config, ParallelContext(rank, tp))
        assert found.shape == (2, 2, config.num_kv_heads // tp, 2)
        k, v = found[1, :, 0].tolist()
        k_zero, v_zero = (numbers[1], numbers[3]) if len(numbers) == 4 else (0.0, 0.0)
        assert k == pytest.approx([numbers[0], k_zero - 128 * numbers[0]])
        assert v == pytest.approx([numbers[-2 if len(numbers) == 4 else -1], v_zero - 128 * v[0]])
        assert torch.equal(found, found[:, :, :1].expand_as(found))
    assert "KV scales" in caplog.text and "are LMDeploy's" in caplog.text
    if tp == 1:
        engine = build_engine(
            EngineConfig(model=str(workspace), dtype="float32", device="cpu", quant_policy=8)
        )
        cache = engine.runner.kv_caches[0]
        assert cache.static and float(cache.k_params[0, 0, 0]) == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (struct.pack("<4f", 0.02, math.nan, 0.03, 0.0), "does not fit this model"),
        (struct.pack("<4f", 0.0, 0.0, 0.03, 0.0), "does not fit this model"),
        (struct.pack("<2f", -1.0, 0.03), "does not fit this model"),
        (struct.pack("<3f", 0.02, 0.0, 0.03), "is damaged"),
        (b"", "is damaged"),
    ],
)
def test_files_of_kv_scales_that_are_damaged(source, content, words):
    workspace = convert("tiny", source, source.parent / "workspace")
    (workspace / WEIGHTS / "layers.0.past_kv_scale.0.weight").write_bytes(content)
    config = read_model_config(str(workspace))
    with pytest.raises(UserError, match=words):
        read_kv_params(str(workspace), config, ParallelContext())
