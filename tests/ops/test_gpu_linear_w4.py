"""W4A16 in Triton against the reference: on the GPU, or interpreted."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

import kernels.reference
from kernels.packing import W4Weight, dequantize_w4, pack_w4
from tests.ops.gpu_device import DEVICE, ON_GPU

from kernels.gpu import tuning  # isort: skip  (gpu_device decides how Triton is imported)
from kernels.gpu.tuning import (  # isort: skip
    DotConfig,
    MmaConfig,
    WgmmaConfig,
    WideConfig,
    bucket_of,
    default_config,
    division,
)

# The module; the package's attribute of this name is the op.
w4 = importlib.import_module("kernels.gpu.linear_w4")

# Half of the outputs' last bit, and for weights scaled in x's type half of theirs. The interpreter
# cuts bfloat16 off instead of rounding.
RELATIVE = {torch.float16: 5e-4, torch.bfloat16: 4e-3 if ON_GPU else 1.5e-2}
FORMS = [
    MmaConfig(8, 1, 4, 2),
    MmaConfig(16, 2, 2, 1),
    WideConfig(2, True, 8, 2, 2),
    WideConfig(1, False, 8, 4, 1),
    DotConfig(16, 64, 1, False, 4, 2),
    DotConfig(16, 64, 2, True, 4, 2),
]

ON_HOPPER = ON_GPU and torch.cuda.get_device_capability()[0] == 9
needs_hopper = pytest.mark.skipif(not ON_HOPPER, reason="needs a GPU of compute capability 9.0")
HOPPER_FORMS = [
    WgmmaConfig(256, 128, 2, 8, 3, 1),
    WgmmaConfig(128, 128, 4, 8, 6, 1),
    WgmmaConfig(128, 64, 2, 4, 2, 3),
    WgmmaConfig(256, 64, 1, 4, 2, 1),
    WgmmaConfig(64, 64, 8, 4, 4, 3),
]


def drawn_weight(rows: int, columns: int, group_size: int = 128, seed: int = 0) -> W4Weight:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    groups = (rows, columns // group_size)
    zeros = torch.randint(0, 16, groups, generator=generator, dtype=torch.uint8)
    scales = torch.rand(groups, generator=generator) * 0.01 + 0.001
    return moved(pack_w4(q, scales, zeros, group_size))


def moved(weight: W4Weight) -> W4Weight:
    return W4Weight(
        weight.qweight.to(DEVICE),
        weight.scale_zero.to(DEVICE),
        weight.group_size,
        weight.out_features,
        weight.in_features,
    )


def drawn(tokens: int, columns: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, columns, generator=generator).to(DEVICE, dtype)


def expected(x, weight, bias=None, gated=False):
    """In float64."""
    y = x.double() @ dequantize_w4(weight).double().t()
    if bias is not None:
        y += bias.double()
    return kernels.reference.silu_and_mul(y) if gated else y


def close(actual, wanted, roundings=1):
    assert actual.shape == wanted.shape
    bound = RELATIVE[actual.dtype] * roundings
    error = (actual.double() - wanted).norm() / wanted.norm()
    assert error <= bound, error.item()
    # No single element is off either.
    assert (actual.double() - wanted).abs().max() <= 20 * bound * wanted.std()


@pytest.mark.parametrize("form", FORMS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_forms(form, dtype, group_size):
    weight = drawn_weight(96, 384, group_size)
    x, bias = drawn(5, 384, dtype), drawn(1, 96, dtype)[0]
    close(w4.run(x, weight, bias, False, form), expected(x, weight, bias))


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_gated_forms(form):
    # 40 rows of the gate: those of up begin inside a tile.
    weight = drawn_weight(80, 256)
    x = drawn(3, 256, torch.float16)
    close(w4.run(x, weight, None, True, form), expected(x, weight, gated=True))


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_columns_that_fill_no_tile_and_rows_that_lie_apart(form):
    weight = drawn_weight(72, 160, 32)
    wide = drawn(4, 400, torch.float16)
    x = wide[:, 64:224]
    # What lies beyond the columns is not read into the sum.
    wide[:, 224:] = float("nan")
    close(w4.run(x, weight, None, False, form), expected(x, weight))


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_more_tokens_than_a_program_takes(form):
    weight, x = drawn_weight(64, 128), drawn(19, 128, torch.float16)
    close(w4.run(x, weight, None, False, form), expected(x, weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 128])
def test_unpacked_product_in_slices(dtype, group_size, monkeypatch):
    monkeypatch.setattr(w4, "SCRATCH_BYTES", 2 * 160 * 64 * 2)
    columns = 160 if group_size == 32 else 128
    weight = drawn_weight(200, columns, group_size)
    x, bias = drawn(9, columns, dtype), drawn(1, 200, dtype)[0]
    close(w4.unpacked_product(x, weight, bias, False), expected(x, weight, bias), 2)
    close(w4.unpacked_product(x, weight, None, True), expected(x, weight, gated=True), 2)


@pytest.mark.parametrize("tokens", [1, 16] + [100, 300, 600, 1100, 2049] * ON_GPU)
def test_ops(tokens):
    weight = drawn_weight(128, 256)
    x, bias = drawn(tokens, 256, torch.float16), drawn(1, 128, torch.float16)[0]
    close(w4.linear_w4(x, weight, bias), expected(x, weight, bias))
    close(w4.gated_linear_w4(x, weight), expected(x, weight, gated=True), 2)


@pytest.mark.skipif(not ON_GPU, reason="large shapes, and exchanges between lanes: needs a GPU")
@pytest.mark.parametrize("form", [WideConfig(2, True), WideConfig()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("columns", [2080, 4096])
def test_strips_that_programs_stay_for(form, dtype, group_size, columns):
    # Several strips a program, the last one of some programs only; rows that fill no block.
    weight = drawn_weight(12300, columns // group_size * group_size, group_size)
    for tokens in (2, 5, 8):
        x = drawn(tokens, weight.in_features, dtype)
        bias = drawn(1, 12300, dtype)[0]
        close(w4.run(x, weight, bias, False, form), expected(x, weight, bias))
        close(w4.run(x, weight, None, True, form), expected(x, weight, gated=True))


@needs_hopper
@pytest.mark.parametrize("form", HOPPER_FORMS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [5, 77, 300, 1990])
def test_forms_for_hopper(form, dtype, tokens):
    # Rows that fill no tile, more tiles of columns than stages, and columns split among programs.
    weight = drawn_weight(1048, 1152)
    x, bias = drawn(tokens, 1152, dtype), drawn(1, 1048, dtype)[0]
    assert w4.runs_wgmma(x, weight)
    first = w4.run(x, weight, bias, False, form)
    # Weights are scaled in x's type: a rounding more.
    close(first, expected(x, weight, bias), 2)
    gated = w4.run(x, weight, None, True, form)
    close(gated, expected(x, weight, gated=True), 3)
    for _ in range(20):
        assert torch.equal(w4.run(x, weight, bias, False, form), first)
        assert torch.equal(w4.run(x, weight, None, True, form), gated)


@needs_hopper
@pytest.mark.parametrize("form", HOPPER_FORMS, ids=repr)
def test_whole_and_split_tiles_on_hopper(form):
    weight, x = drawn_weight(24576, 1024), drawn(512, 1024, torch.float16)
    close(w4.run(x, weight, None, False, form), expected(x, weight), 2)


@needs_hopper
def test_what_bulk_copies_cannot_read_takes_another_kernel():
    weight = drawn_weight(256, 256)
    assert not w4.runs_wgmma(drawn(256, 256, torch.float16), drawn_weight(256, 256, 64))
    x = drawn(256, 260, torch.float16)[:, 2:258]
    assert not w4.runs_wgmma(x, weight)
    close(w4.linear_w4(x, weight, None), expected(x, weight), 2)


@pytest.mark.parametrize("tiles", [1, 32, 96, 132, 133, 172, 344, 1000])
@pytest.mark.parametrize("column_tiles", [1, 9, 32, 86])
@pytest.mark.parametrize("parts", [1, 2, 8])
def test_every_tile_is_dealt_out_once(tiles, column_tiles, parts):
    most = 132
    dealt = division(tiles, column_tiles, most, parts)
    assert 1 <= dealt.programs <= most
    assert dealt.full * dealt.programs + dealt.rest == tiles or not dealt.full
    assert dealt.full * most + dealt.rest == tiles
    if dealt.rest:
        # A program's part reaches into a second tile at most, and all parts are there.
        assert column_tiles / parts <= dealt.units <= column_tiles
        assert dealt.programs * dealt.units >= dealt.rest * column_tiles


def test_columns_of_x_may_lie_apart_and_off_a_pair():
    weight = drawn_weight(64, 128)
    x = drawn(128, 2, torch.float16).t()
    close(w4.linear_w4(x, weight, None), expected(x, weight))
    x = drawn(2, 131, torch.float16)[:, 1:129]
    close(w4.linear_w4(x, weight, None), expected(x, weight))


def test_longer_prompts_than_measured_are_unpacked():
    assert [bucket_of(tokens) for tokens in (512, 513)] == [512, None]
    assert [bucket_of(tokens, True) for tokens in (513, 2048, 2049)] == [1024, 2048, None]


def test_no_tokens():
    weight = drawn_weight(64, 128)
    assert w4.linear_w4(drawn(0, 128, torch.float16), weight, None).shape == (0, 64)
    assert w4.gated_linear_w4(drawn(0, 128, torch.float16), weight).shape == (0, 32)


@pytest.mark.parametrize("gated", [False, True])
def test_batch_invariance(gated):
    weight = drawn_weight(256, 512) if ON_GPU else drawn_weight(64, 256)
    counts = [1, 7, 16, 64, 700] if ON_GPU else [1, 9, 33]
    x = drawn(counts[-1], weight.in_features, torch.float16)

    def product(rows):
        if gated:
            return w4.gated_linear_w4(rows, weight, True)
        return w4.linear_w4(rows, weight, None, True)

    whole = product(x)
    close(whole, expected(x, weight, gated=gated))
    for count in counts:
        assert torch.equal(product(x[-count:]), whole[-count:])


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_the_same_bits_every_time(form):
    weight, x = drawn_weight(128, 256), drawn(3, 256, torch.float16)
    first = w4.run(x, weight, None, False, form)
    for _ in range(20 if ON_GPU else 1):
        assert torch.equal(w4.run(x, weight, None, False, form), first)


def test_what_cannot_be_multiplied_is_said():
    weight = drawn_weight(64, 128)
    with pytest.raises(ValueError, match="float32"):
        w4.linear_w4(drawn(1, 128, torch.float32), weight, None)
    with pytest.raises(ValueError, match="128 columns"):
        w4.linear_w4(drawn(1, 64, torch.float16), weight, None)
    with pytest.raises(ValueError, match="odd"):
        w4.gated_linear_w4(drawn(1, 128, torch.float16), drawn_weight(63, 128))


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("tokens", [1, 8, 9, 64, 128, 256, 512, 513, 2048])
def test_the_rule_has_an_answer_for_every_shape(tokens, hopper):
    bucket = bucket_of(tokens, hopper)
    if bucket is None:
        assert tokens > 512 and not hopper
        return
    for rows, columns in [(64, 128), (12288, 4096), (57344, 8192), (8192, 28672)]:
        config = default_config(132, rows, columns, bucket, hopper)
        assert hopper or not isinstance(config, WgmmaConfig)
        assert config.tokens <= 256 and config.warps in (4, 8, 16)


def test_a_table_goes_before_the_rule(tmp_path, monkeypatch):
    entry = {"kernel": "mma", "tokens": 8, "blocks": 2, "warps": 4, "ahead": 1}
    table = {"linear_w4": {"64x128": {"8": entry}}}
    (tmp_path / "some_gpu.json").write_text(json.dumps(table), encoding="utf-8")
    monkeypatch.setattr(tuning, "TUNED", tmp_path)

    def found(op, bucket):
        return tuning.w4_config("Some GPU", 4, op, 64, 128, bucket)

    assert found("linear_w4", 8) == MmaConfig(8, 2, 4, 1)
    assert found("linear_w4", 16) == default_config(4, 64, 128, 16)
    assert found("gated_linear_w4", 8) == default_config(4, 64, 128, 8)


def test_the_tables_hold_what_can_be_launched():
    for path in tuning.TUNED.glob("*.json"):
        for op, shapes in json.loads(path.read_text(encoding="utf-8")).items():
            for shape in shapes:
                rows, columns = map(int, shape.split("x"))
                for hopper in (False, True):
                    for bucket in tuning.HOPPER_BUCKETS if hopper else tuning.BUCKETS:
                        config = tuning.w4_config(
                            "NVIDIA H200", 132, op, rows, columns, bucket, hopper
                        )
                        assert config.warps in (4, 8, 16) and 8 <= config.tokens <= 256
                        assert hopper or not isinstance(config, WgmmaConfig)
