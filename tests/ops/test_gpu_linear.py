"""Products in Triton against the reference: on the GPU, or interpreted."""

from __future__ import annotations

import importlib

import pytest
import torch

import kernels.reference
from kernels.packing import W8Weight
from tests.ops.gpu_device import DEVICE, ON_GPU

# gpu_device decides how Triton is imported
from kernels.gpu.few_tokens import Chunks, few_tokens  # isort: skip

# The modules; the package's attributes of these names are the ops.
linear = importlib.import_module("kernels.gpu.linear")
linear_w8 = importlib.import_module("kernels.gpu.linear_w8")

# The interpreter takes the bits of bfloat16 operands of `tl.dot` for whole numbers.
HALVES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16]
DTYPES = [torch.float32, *HALVES]
ALL_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Against the largest element; the interpreter cuts bfloat16 off instead of rounding.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
# (rows, columns): whole tiles, then ragged ends in both.
SHAPES = [(96, 256), (70, 200)]


def drawn(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max()
    assert error <= TOLERANCE[actual.dtype] * expected.double().abs().max()


def exact(x, weight, bias):
    """The product in float64, rounded once."""
    product = x.double() @ weight.double().t()
    return (product if bias is None else product + bias.double()).to(x.dtype)


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_products(tokens, shape, dtype, invariant):
    x, weight = drawn((tokens, shape[1]), dtype), drawn(shape, dtype, 1)
    bias = drawn(shape[:1], dtype, 2)
    close(linear.linear(x, weight, bias, invariant), exact(x, weight, bias))
    if dtype is torch.float16:
        close(linear.linear(x, weight, None, invariant), exact(x, weight, None))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_form_for_few_tokens(dtype, shape):
    x, weight, bias = drawn((17, shape[1]), dtype), drawn(shape, dtype, 1), drawn(shape[:1], dtype)
    for tile in (linear.Tile(16, 16, 128, 2, 3), linear.Tile(64, 32, 64, 4, 3)):
        close(linear.matmul(x, weight, bias, tile), exact(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 256), (70, 224), (16, 32)])
@pytest.mark.parametrize("tokens", [1, 3, 8, 13])
def test_few_tokens(tokens, shape, dtype):
    x, weight = drawn((tokens, shape[1]), dtype), drawn(shape, dtype, 1)
    bias = drawn(shape[:1], dtype)
    for chunks in (Chunks(1, 4, 2), Chunks(2, 8, 4)):
        close(few_tokens(x, weight, bias, chunks), exact(x, weight, bias))


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_token(dtype, shape):
    x, weight, bias = drawn((1, shape[1]), dtype), drawn(shape, dtype, 1), drawn(shape[:1], dtype)
    for strip in (linear.Strip(2, 64, 4), linear.Strip(4, 1024, 4)):
        close(linear.one_token(x, weight, bias, strip), exact(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariance(dtype):
    x, weight, bias = drawn((70, 200), dtype), drawn((96, 200), dtype, 1), drawn((96,), dtype, 2)
    together = linear.linear(x, weight, bias, True)
    for start, count in ((0, 1), (3, 1), (69, 1), (0, 16), (2, 17), (5, 64)):
        part = x[start : start + count]
        alone = linear.linear(part, weight, bias, True)
        assert torch.equal(alone, together[start : start + count])


def test_views_are_read_where_they_lie():
    x = drawn((5, 300), torch.float16)[:, 40:168]
    weight = drawn((64, 200), torch.float16, 1)[:, 8:136]
    for invariant in (False, True):
        for tokens in (1, 5):
            actual = linear.linear(x[:tokens], weight, None, invariant)
            close(actual, exact(x[:tokens], weight, None))


def quantized_weight(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
    scales = torch.rand(rows, generator=generator) * 0.01 + 0.001
    return W8Weight(q.to(DEVICE), scales.to(DEVICE))


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_int8_products(tokens, shape, dtype):
    x, weight = drawn((tokens, shape[1]), dtype), quantized_weight(*shape)
    bias = drawn(shape[:1], dtype, 2)
    close(linear_w8.linear_w8(x, weight, bias), kernels.reference.linear_w8(x, weight, bias))
    close(linear_w8.linear_w8(x, weight, None), kernels.reference.linear_w8(x, weight, None))


def test_tokens_are_rounded_half_to_even_a_scale_each():
    x = torch.tensor([[127.0, 2.5, -3.5, 0.4], [0.0, 0.0, 0.0, 0.0]], device=DEVICE)
    quantized, scales = linear_w8.quantize_tokens(x)
    assert quantized.tolist() == [[127, 2, -4, 0], [0, 0, 0, 0]]
    assert scales[0] == 1.0


def test_int8_products_have_the_same_bits_in_every_batch():
    x, weight = drawn((100, 200), torch.float16), quantized_weight(70, 200)
    together = linear_w8.linear_w8(x, weight, None)
    for start, count in ((0, 1), (3, 1), (40, 30)):
        alone = linear_w8.linear_w8(x[start : start + count], weight, None, True)
        assert torch.equal(alone, together[start : start + count])


@pytest.mark.parametrize("tokens", [0, 1, 7, 16, 40, 300] if ON_GPU else [0])
def test_shapes_of_a_model(tokens):
    x, weight = drawn((tokens, 4096), torch.float16), drawn((1000, 4096), torch.float16, 1)
    packed = quantized_weight(1000, 4096)
    for actual, expected in (
        (linear.linear(x, weight, None), exact(x, weight, None)),
        (linear.linear(x, weight, None, True), exact(x, weight, None)),
        (linear_w8.linear_w8(x, packed, None), kernels.reference.linear_w8(x, packed, None)),
    ):
        assert actual.shape == (tokens, 1000)
        if tokens:
            close(actual, expected)


def test_shapes_that_do_not_fit_are_refused():
    x, weight = drawn((2, 8), torch.float32), drawn((4, 8), torch.float32)
    with pytest.raises(ValueError, match="weight"):
        linear.linear(x, drawn((4, 6), torch.float32), None)
    with pytest.raises(ValueError, match="float16"):
        linear.linear(x.half(), weight, None)
    with pytest.raises(ValueError, match="bias"):
        linear.linear(x, weight, drawn((3,), torch.float32))
    with pytest.raises(ValueError, match="linear_w8"):
        linear_w8.linear_w8(x, quantized_weight(4, 6), None)
    with pytest.raises(ValueError, match="bias"):
        linear_w8.linear_w8(x, quantized_weight(4, 8), drawn((3,), torch.float32))


@pytest.mark.parametrize("rows", [4096, 8192, 32000] if ON_GPU else [16])
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 16, 17] if ON_GPU else [1, 2])
def test_whichever_form_the_shape_asks_for(tokens, rows):
    for columns in (512, 2080) if ON_GPU else (32,):
        x, weight = drawn((tokens, columns), torch.float16), drawn((rows, columns), torch.float16)
        close(linear.linear(x, weight, None), exact(x, weight, None))
