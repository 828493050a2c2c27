"""Scales of the KV cache measured beforehand: from ranges to a file to the engine's pools."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from backend.config import EngineConfig, SamplingParams
from backend.engine.kv_cache import KVShape, allocate
from backend.engine.types import Request
from backend.engine.worker import build_engine
from backend.errors import UserError
from backend.layers.parallel import ParallelContext
from backend.models.kv_params import FILE_NAME, read_kv_params
from backend.models.registry import read_model_config
from kernels import ops
from kernels.reference import dequantize_kv
from quantize.blocks import BlockModel
from quantize.kv_qparams import head_params, write_kv_qparams
from tests.tiny_model import make_checkpoint
from tests.unit.test_awq import edit_config

CPU = torch.device("cpu")
LAYERS, HEADS, DIM = 2, 2, 16


def ranges(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randn(LAYERS, HEADS, DIM, generator=generator)
    width = torch.rand(LAYERS, HEADS, DIM, generator=generator) + 0.1
    return [(m - w, m + w) for m, w in zip(middle, width)]


KEYS, VALUES = ranges(1), ranges(2)


@pytest.fixture
def folder(tmp_path) -> Path:
    make_checkpoint(tmp_path, "llama")
    return tmp_path


def read(folder: Path, rank: int = 0, ranks: int = 1) -> torch.Tensor:
    params = read_kv_params(
        str(folder), read_model_config(str(folder)), ParallelContext(rank, ranks)
    )
    assert params is not None
    return params


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_range_is_covered(symmetric):
    low, high = KEYS[0]
    scale, zero = head_params(low, high, symmetric).unbind(-1)
    top = zero + 255 * scale
    if symmetric:
        torch.testing.assert_close(top, -zero)
        largest = torch.maximum(low.abs(), high.abs()).amax(-1)
        torch.testing.assert_close(top, largest)
    else:
        torch.testing.assert_close(zero, low.amin(-1))
        torch.testing.assert_close(top, high.amax(-1))


def test_values_that_never_change():
    params = head_params(torch.full((1, 4), 3.0), torch.full((1, 4), 3.0))
    assert params[0, 0] > 0 and params[0, 1] == 3


@pytest.mark.parametrize("value", [70000.0, float("inf"), float("nan")])
def test_values_beyond_float16(value):
    with pytest.raises(UserError, match="beyond the range of float16"):
        head_params(torch.zeros(2, 4), torch.full((2, 4), value))


@pytest.mark.parametrize("num_tp", [1, 2, 4])
def test_read_by_any_number_of_ranks(folder, num_tp):
    write_kv_qparams(folder, KEYS, VALUES, num_tp=num_tp)
    whole = read(folder)
    assert whole.shape == (LAYERS, 2, HEADS, 2)
    for layer in range(LAYERS):
        torch.testing.assert_close(whole[layer, 0], head_params(*KEYS[layer]))
        torch.testing.assert_close(whole[layer, 1], head_params(*VALUES[layer]))
    for ranks, heads in ((2, (0, 1)), (4, (0, 0, 1, 1))):
        for rank, head in enumerate(heads):
            assert torch.equal(read(folder, rank, ranks), whole[:, :, head : head + 1])


def test_a_file_that_is_there(folder):
    path = write_kv_qparams(folder, KEYS, VALUES)
    before = path.read_text()
    with pytest.raises(UserError, match="is there already"):
        write_kv_qparams(folder, VALUES, KEYS)
    assert path.read_text() == before
    write_kv_qparams(folder, VALUES, KEYS, overwrite=True)
    assert path.read_text() != before and not list(folder.glob("*.partial"))


def test_ranks_that_do_not_divide_the_heads(folder):
    with pytest.raises(UserError, match="KV heads"):
        write_kv_qparams(folder, KEYS, VALUES, num_tp=3)
    assert not (folder / FILE_NAME).exists()


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        write_kv_qparams(tmp_path / "none", KEYS, VALUES)


def test_a_file_that_cannot_be_written(folder):
    (folder / f"{FILE_NAME}.partial").mkdir()
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        write_kv_qparams(folder, KEYS, VALUES)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_model_whose_values_quantization_changed(tmp_path, kv_heads):
    """V is smoothed only where each of the four query heads has a KV head of its own."""
    make_checkpoint(tmp_path, "llama", num_key_value_heads=kv_heads)
    edit_config(tmp_path, quantization_config={"quant_method": "smooth_quant"})
    if kv_heads == 4:
        with pytest.raises(UserError, match="changed the scale of its values"):
            write_kv_qparams(tmp_path, KEYS, VALUES)
    else:
        write_kv_qparams(tmp_path, KEYS, VALUES)


@pytest.mark.parametrize(
    "change",
    [
        {"num_tp": 0},
        {"num_tp": None},
        {"bits": 4},
        {"layers.0.past_kv_scale.0.weight": None},
        {"layers.1.past_kv_scale.0.weight": [[1, 0, 1, 0]]},
        {"layers.1.past_kv_scale.0.weight": [[0, 0, 1, 0]] * 2},
        {"layers.1.past_kv_scale.0.weight": [[1, 0, 1]] * 2},
        {"layers.1.past_kv_scale.0.weight": [[1, 1e6, 1, 0]] * 2},
        {"layers.1.past_kv_scale.0.weight": [[1e4, 0, 1, 0]] * 2},
        {"layers.2.past_kv_scale.0.weight": [[1, 0, 1, 0]] * 2},
    ],
    ids=str,
)
def test_damaged_or_of_another_model(folder, change):
    path = write_kv_qparams(folder, KEYS, VALUES)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match="does not fit this model") as caught:
        read(folder)
    assert "kv_qparams" in caught.value.hint


def test_no_file(folder):
    config = read_model_config(str(folder))
    assert read_kv_params(str(folder), config, ParallelContext()) is None


@pytest.mark.parametrize("bits", [8, 4])
def test_pools_with_them(folder, bits):
    write_kv_qparams(folder, KEYS, VALUES)
    shape = KVShape(LAYERS, HEADS, DIM, torch.float32, bits, read(folder))
    assert shape.bytes_per_token == LAYERS * 2 * HEADS * DIM * bits // 8
    cache = allocate(shape, 24, CPU)[1]
    assert cache.static and cache.k_params.shape == (HEADS, 24, 2)
    low, high = KEYS[1]
    x = (low + (high - low) * torch.rand(5, 1, 1, generator=torch.Generator().manual_seed(3)))
    slots = torch.arange(5) + 3
    ops.store_kv(x, x, cache, slots)
    stored = dequantize_kv(cache.k[:, slots], cache.k_params[:, slots], bits).transpose(0, 1)
    step = float((high.amax(-1) - low.amin(-1)).max()) / (2**bits - 1)
    assert float((stored - x).abs().max()) < 0.51 * step + 2e-3  # the zero is a float16
    assert torch.equal(cache.k_params[:, 0], cache.k_params[:, 23])  # storing left them alone


def observed(folder: Path, ids: torch.Tensor) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Ranges of K and V of every layer over `ids` [B, S], by the blocks themselves."""
    model = BlockModel(folder, CPU)
    hidden = model.embed(ids)
    found: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[], []]
    for index in range(model.num_blocks):
        hidden = model.run(model.load_block(index), hidden)
        for which, tensor in zip(found, model.kv()):
            which.append(torch.aminmax(tensor.flatten(0, 1), dim=0))
    return found


def top_logprobs(folder: Path, text: list[int], **options) -> dict[int, float]:
    engine = build_engine(
        EngineConfig(
            model=str(folder), dtype="float32", device="cpu", session_len=128,
            max_prefill_token_num=16, cache_block_seq_len=8, **options,
        )
    )  # fmt: skip
    sampling = SamplingParams(temperature=0.0, max_tokens=1, logprobs=5)
    engine.add_request(Request("0", text, sampling))
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    return dict(outputs[0].logprobs[0].top)


DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo_model"


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("quant_policy", "tolerance"), [(8, 0.1), (4, 2.0)])
def test_the_engine_uses_them(tmp_path, quant_policy, tolerance, symmetric, caplog):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in DEMO.iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file)
    text = [300 + 7 * i + j for i in range(4) for j in range(12)]
    online = top_logprobs(folder, text, quant_policy=quant_policy)
    assert online == top_logprobs(folder, text, kv_cache_dtype=f"int{quant_policy}")
    plain = top_logprobs(folder, text)
    keys, values = observed(folder, torch.tensor([text]))
    write_kv_qparams(folder, keys, values, symmetric=symmetric)
    with caplog.at_level("INFO"):
        static = top_logprobs(folder, text, quant_policy=quant_policy)
    assert "scaled by head, as kv_qparams.json" in caplog.text
    assert ("In 4 bits such scales are coarse" in caplog.text) == (quant_policy == 4)
    best = max(plain, key=plain.__getitem__)
    assert static != online and abs(static[best] - plain[best]) < tolerance
    assert top_logprobs(folder, text) == plain  # in 16 bits they mean nothing


def test_an_empty_folder_gets_a_workspaces_files(tmp_path):
    """To be copied into one, as LMDeploy's users may do it."""
    for overwrite in (False, True):
        assert write_kv_qparams(tmp_path, KEYS, VALUES, overwrite=overwrite) == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"layers.{layer}.past_kv_scale.0.weight" for layer in range(LAYERS)]
    with pytest.raises(UserError, match="is there already"):
        write_kv_qparams(tmp_path, KEYS, VALUES)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="config.json"):
        write_kv_qparams(tmp_path, KEYS, VALUES, overwrite=True)
