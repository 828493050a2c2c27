"""The whole job: on the bundled model, and killed in the middle on a tiny one."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from backend.errors import UserError
from backend.layers.parallel import ParallelContext
from backend.models.loader import load_model
from backend.models.registry import read_model_config
from backend.tokenizer import Tokenizer
from quantize.auto_awq import auto_awq
from quantize.awq import SearchSettings
from quantize.blocks import BlockModel
from quantize.data import Samples, load_samples
from quantize.progress import Progress
from quantize.rtn import GroupFormat
from tests.parity.test_logits import paged_logits
from tests.quantization.second_reader import read_logits
from tests.tiny_model import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "assets" / "demo_model"
CPU = torch.device("cpu")
TINY = SearchSettings(GroupFormat(4, 32))

# Ends itself as `kill -9` would, when the second block is on the disk.
KILLED = """
import os, signal, sys
from quantize.progress import Progress
from tests.quantization.test_auto_awq import run_tiny

class Killer(Progress):
    def step(self, **figures):
        super().step(**figures)
        if self._done == 2:
            os.kill(os.getpid(), signal.SIGKILL)

run_tiny(sys.argv[1], sys.argv[2], Killer())
"""


def run(source, target, samples: Samples, search: SearchSettings, progress=None, **options):
    progress = progress or Progress("text", stream=open("/dev/null", "w"))
    return auto_awq(
        str(source), str(target), samples, search, CPU, torch.float32, progress, **options
    )


def tiny_samples(source) -> Samples:
    return load_samples("bundled", Tokenizer.from_folder(source), 4, 32)


def run_tiny(source, target, progress=None, **options):
    return run(source, target, tiny_samples(source), TINY, progress, **options)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


@pytest.fixture
def tiny(tmp_path):
    folder = tmp_path / "model"
    make_checkpoint(folder, "llama", num_hidden_layers=3, num_key_value_heads=4)
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Bundled model by AWQ and by round to nearest: 8 samples of 256 tokens."""
    folder = tmp_path_factory.mktemp("demo")
    samples = load_samples("bundled", Tokenizer.from_folder(DEMO), 8, 256)
    before = digests_of_files(DEMO)
    run(DEMO, folder / "awq", samples, SearchSettings()).publish()
    run(DEMO, folder / "rtn", samples, SearchSettings(GroupFormat(), False, False, False)).publish()
    assert digests_of_files(DEMO) == before
    return folder


def digests_of_files(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*")) if path.is_file()
    }


def heldout_ids() -> torch.Tensor:
    text = (ROOT / "assets" / "calibration" / "heldout_en.txt").read_text(encoding="utf-8")
    return torch.tensor(Tokenizer.from_folder(DEMO).encode(text[:8000]))[:512]


def test_the_bundled_model_loads_here_and_in_the_second_reader(demo):
    config = read_model_config(str(demo / "awq"))
    assert config.quantization is not None and config.quantization.group_size == 128
    load_model(str(demo / "awq"), torch.float32, CPU, ParallelContext())
    ids = heldout_ids()[:100]
    logits = paged_logits(demo / "awq", ids, [100], scattered=False)
    torch.testing.assert_close(logits, read_logits(demo / "awq", ids), atol=1e-4, rtol=0)
    sizes = [sum(p.stat().st_size for p in f.glob("*.safetensors")) for f in (DEMO, demo / "awq")]
    assert sizes[1] < 0.5 * sizes[0]  # 22 % of it are embeddings, which stay


def test_the_bundled_model_loses_less_than_by_round_to_nearest(demo):
    ids = heldout_ids()
    exact, awq, rtn = (
        paged_logits(folder, ids, [len(ids)], scattered=False).log_softmax(-1)
        for folder in (DEMO, demo / "awq", demo / "rtn")
    )
    kl = [float((exact.exp() * (exact - found)).sum(-1).mean()) for found in (awq, rtn)]
    assert kl[0] < 0.7 * kl[1] < 0.1


def test_a_killed_job_goes_on_and_gives_the_same_bytes(tmp_path, tiny):
    before = digests(tiny)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tiny), str(tmp_path / "killed")],
        cwd=ROOT, capture_output=True, text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    partial = tmp_path / "killed.partial"
    assert partial.is_dir() and not (tmp_path / "killed").exists()
    with pytest.raises(UserError, match="no config.json"):
        load_model(str(partial), torch.float32, CPU, ParallelContext())
    kept = digests(partial)
    shards = {"model-00002-of-00004.safetensors", "model-00003-of-00004.safetensors"}
    assert {name for name in kept if "safetensors" in name} == shards

    notes: list[str] = []
    progress = Progress("text", stream=open("/dev/null", "w"))
    progress.note = notes.append  # type: ignore[method-assign]
    writer = run_tiny(tiny, tmp_path / "killed", progress)
    assert any("after block 2" in note for note in notes)
    assert not (tmp_path / "killed").exists()  # not before it is published
    resumed = writer.publish()
    undisturbed = run_tiny(tiny, tmp_path / "undisturbed").publish()
    assert digests(resumed) == digests(undisturbed)
    assert {name: digests(resumed)[name] for name in shards} == {n: kept[n] for n in shards}
    assert digests(tiny) == before
    assert not partial.exists()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2", "qwen3"])
def test_every_family(tmp_path, family, symmetric):
    source, target = tmp_path / "model", tmp_path / "awq"
    make_checkpoint(source, family)
    search = SearchSettings(GroupFormat(4, 32, symmetric))
    run(source, target, tiny_samples(source), search).publish()
    ids = torch.arange(40) * 7 % 256
    logits = paged_logits(target, ids, [40], scattered=False)
    torch.testing.assert_close(logits, read_logits(target, ids), atol=2e-4, rtol=0)


def test_batches_do_not_change_the_result_much(tmp_path, tiny):
    whole = run_tiny(tiny, tmp_path / "a").folder
    parts = run_tiny(tiny, tmp_path / "b", batch_size=1).folder
    ids = torch.arange(30)
    torch.testing.assert_close(read_logits(whole, ids), read_logits(parts, ids), atol=0.5, rtol=0)


def test_memory_that_ends_in_the_middle_of_a_batch_changes_nothing(tmp_path, tiny, monkeypatch):
    expected = digests(run_tiny(tiny, tmp_path / "expected", batch_size=2).publish())
    original = BlockModel.run

    def run_small(self, block, hidden, lengths=None):
        output = original(self, block, hidden, lengths)  # its inputs have been observed
        if len(hidden) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return output

    monkeypatch.setattr(BlockModel, "run", run_small)
    notes: list[str] = []
    progress = Progress("text", stream=open("/dev/null", "w"))
    progress.note = notes.append  # type: ignore[method-assign]
    found = run_tiny(tiny, tmp_path / "found", progress, batch_size=4).publish()
    assert digests(found) == expected
    assert len([note for note in notes if "with 2 sample" in note]) == 1


def test_refusals(tmp_path, tiny):
    samples = tiny_samples(tiny)
    with pytest.raises(UserError, match="3-bit weights cannot be written"):
        run(tiny, tmp_path / "x", samples, SearchSettings(GroupFormat(3, 32)))
    with pytest.raises(UserError, match="inputs, which the group size 128 does not divide"):
        run(tiny, tmp_path / "x", samples, SearchSettings())
    with pytest.raises(UserError, match="never touched"):
        run_tiny(tiny, tiny / "inside")
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.partial").exists()
    awq = run_tiny(tiny, tmp_path / "awq").publish()
    with pytest.raises(UserError, match="quantized already"):
        run(awq, tmp_path / "twice", samples, TINY)
    with pytest.raises(UserError, match="exists already"):
        run_tiny(tiny, awq)
    tensors = load_file(tiny / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, tiny / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="contains NaN"):
        run_tiny(tiny, tmp_path / "nan")
    assert not (tmp_path / "nan").exists()
