"""W4A16 kernels on a GPU: time by shape and tokens, a token's whole matrix work, and tuning.

    python -m tests.bench.kernels_w4 [--tune FILE] [--models llama-2-7b ...] [--tokens 1 16 ...]

Prints a table: microseconds, GB/s over the weight's exact bytes, share of 4.3 TB/s (what an H200
copies), TFLOP/s. `--tune` first tries all candidates for every shape and writes the fastest as a
table for `kernels/gpu/tuned/`. Launches are timed in CUDA graphs that rotate over copies of the
weight of more than three times the L2 cache, on random data.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.gpu.tuning import (
    HOPPER_BUCKETS,
    KINDS,
    DotConfig,
    MmaConfig,
    W4Config,
    WgmmaConfig,
    WideConfig,
)
from kernels.packing import W4Weight

# The module; the package's attribute of this name is the op.
w4 = importlib.import_module("kernels.gpu.linear_w4")

COPY_BANDWIDTH = 4.3e12  # bytes/s, measured on an H200
ROTATED_BYTES = 200 << 20
LAUNCHES, REPLAYS = 20, 7
COMPILERS = 14  # processes
# Tiles and stages that fit one, two or three programs a multiprocessor.
HOPPER_FORMS = (
    WgmmaConfig(256, 128, stages=3),
    WgmmaConfig(128, 128, stages=6),
    WgmmaConfig(256, 64, warps=4, stages=2),
    WgmmaConfig(128, 64, warps=4, stages=3, programs=2),
    WgmmaConfig(128, 64, warps=4, stages=2, programs=3),
    WgmmaConfig(64, 64, warps=4, stages=4, programs=3),
)


class Shape(NamedTuple):
    """A matrix: rows and columns, and whether it is a gate and up."""

    rows: int
    columns: int
    gated: bool = False


MODELS = {
    name: [
        Shape(qkv, hidden),
        Shape(hidden, hidden),
        Shape(2 * inner, hidden, True),
        Shape(hidden, inner),
    ]
    for name, (hidden, qkv, inner) in {
        "llama-2-7b": (4096, 12288, 11008),
        "llama-3-8b": (4096, 6144, 14336),
        "llama-2-13b": (5120, 15360, 13824),
    }.items()
}
LAYERS = {"llama-2-7b": 32, "llama-3-8b": 32, "llama-2-13b": 40}


def random_weight(shape: Shape, group_size: int = 128) -> W4Weight:
    """Random numbers, zeros of 8, scales that keep a product about as large as x."""
    tiles, columns = -(-shape.rows // 64), -(-shape.columns // 128)
    size = (tiles, columns, 64, 16)
    words = torch.randint(-(2**31), 2**31, size, dtype=torch.int64, device="cuda")
    pairs = torch.rand(tiles, columns * 128 // group_size, 64, 2, device="cuda")
    pairs[..., 0] = (pairs[..., 0] + 0.5) / (4.6 * shape.columns**0.5)
    pairs[..., 1] = 1024 + 8
    scale_zero = pairs.to(torch.float16).view(torch.int32).squeeze(-1)
    return W4Weight(words.to(torch.int32), scale_zero, group_size, shape.rows, shape.columns)


def weight_bytes(weight: W4Weight) -> int:
    return 4 * (weight.qweight.numel() + weight.scale_zero.numel())


def graph_seconds(work: Callable[[], object]) -> float:
    """Median time of a graph of `work`."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        work()
    times = []
    for _ in range(REPLAYS + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[1:])


def seconds(product: Callable[[W4Weight], Tensor], copies: list[W4Weight]) -> float:
    """Of one product, over many that rotate through the weight's copies."""
    count = max(LAUNCHES, len(copies))

    def work() -> None:
        for i in range(count):
            product(copies[i % len(copies)])

    return graph_seconds(work) / count


def candidates(bucket: int, shape: Shape) -> Iterator[W4Config]:
    """What is tried."""
    tiles = -(-shape.columns // 128)
    if bucket <= 16:
        if bucket == 8:
            yield from (WideConfig(*form) for form in ((1, False), (2, False)))
            if tiles <= 32:  # more of x than the registers hold
                yield from (WideConfig(*form) for form in ((1, True), (2, True)))
        blocks_of = {1: (1, 2), 8: (1, 2, 4), 16: (2,)}[bucket]
        for blocks, warps, ahead in itertools.product(blocks_of, (4, 8, 16), (1, 2, 4, 8)):
            # As many loads on their way as registers allow, but no more than there are.
            if -(-tiles // warps) > ahead // 2 and 2 <= blocks * ahead <= 8:
                yield MmaConfig(max(8, bucket), blocks, warps, ahead)
    for tokens in (16, 32, 64, 128, 256):
        if not 8 < bucket <= 512 or not min(bucket, 256) // 2 <= tokens <= bucket:
            continue
        stages_of = (3, 4, 6) if tokens == 16 else (3, 4) if tokens <= 64 else (2, 3)
        for stages, rows, splits in itertools.product(stages_of, (128, 64), (1, 2, 3, 4, 6, 8)):
            programs = -(-shape.rows // rows) * -(-bucket // tokens) * splits
            if programs < 60 or (splits > 1 and programs > 800) or (rows, tokens) == (64, 256):
                continue
            warps = 8 if rows == 128 and tokens >= 128 else 4
            for scaled in (True, False) if tokens == 64 else (tokens > 64,):
                yield DotConfig(tokens, rows, splits, scaled, warps, stages)
    if torch.cuda.get_device_capability()[0] == 9:
        for form, parts in itertools.product(HOPPER_FORMS, (1, 2, 4)):
            if form.tokens <= bucket <= 16 * form.tokens:
                yield replace(form, parts=parts)


def activations(tokens: int, columns: int) -> Tensor:
    return torch.randn(tokens, columns, device="cuda", dtype=torch.float16)


def compiled(task: tuple[Shape, W4Config]) -> tuple[Shape, W4Config, str]:
    """Compile a candidate, in a process of its own: Triton keeps the result on disk."""
    shape, config = task
    try:
        x = activations(config.tokens, shape.columns)
        w4.run(x, random_weight(shape), None, shape.gated, config)
        torch.cuda.synchronize()
    except Exception as error:  # a candidate may ask for more than the GPU has
        return shape, config, str(error)[:120]
    return shape, config, ""


def code_of(shape: Shape, config: W4Config) -> tuple[object, ...]:
    """What the compiled code of a candidate depends on."""
    if isinstance(config, MmaConfig | WideConfig):
        return shape.columns, shape.gated, config
    if isinstance(config, WgmmaConfig):
        return shape.gated, replace(config, parts=1)
    return shape.gated, replace(config, splits=min(config.splits, 2))


def tune(shapes: list[Shape], buckets: list[int], path: Path, patience: float) -> None:
    """Time every candidate and write the fastest of each shape and bucket."""
    every = [(shape, form) for b in buckets for shape in shapes for form in candidates(b, shape)]
    wanted = {code_of(*pair): pair for pair in every}
    start = time.monotonic()
    pool = ProcessPoolExecutor(COMPILERS, multiprocessing.get_context("spawn"))
    jobs = [pool.submit(compiled, task) for task in wanted.values()]
    done, late = wait(jobs, timeout=patience)
    pool.shutdown(wait=False, cancel_futures=True)
    results = [job.result() for job in done]
    tasks = {code_of(shape, config): error for shape, config, error in results}
    failed = [f"{shape} {config}: {error}" for shape, config, error in results if error]
    print(f"{len(done)} compiled in {time.monotonic() - start:.0f} s, {len(late)} not in time,")
    print(f"{len(failed)} failed", *failed[:5], sep="\n   ", flush=True)
    table: dict[str, dict[str, dict[str, dict[str, object]]]] = {}
    for shape in shapes:
        copies = rotated(shape)
        op = "gated_linear_w4" if shape.gated else "linear_w4"
        entries = table.setdefault(op, {}).setdefault(f"{shape.rows}x{shape.columns}", {})
        for bucket in buckets:
            x = activations(bucket, shape.columns)
            timed = []
            for config in candidates(bucket, shape):
                if tasks.get(code_of(shape, config)) == "":
                    timed.append((timed_run(x, copies, shape, config), config))
            if not timed:
                continue
            timed.sort(key=lambda pair: pair[0])
            print(shape, bucket, *(f"{t * 1e6:.1f} {c}" for t, c in timed[:4]), sep="\n   ")
            best = timed[0][1]
            kind = next(name for name, form in KINDS.items() if isinstance(best, form))
            entries[str(bucket)] = {"kernel": kind} | {
                name: getattr(best, name) for name in type(best).__slots__
            }
            path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def timed_run(x: Tensor, copies: list[W4Weight], shape: Shape, config: W4Config) -> float:
    return seconds(lambda weight: w4.run(x, weight, None, shape.gated, config), copies)


def rotated(shape: Shape) -> list[W4Weight]:
    first = random_weight(shape)
    count = max(3, -(-ROTATED_BYTES // weight_bytes(first)))
    return [first, *(random_weight(shape) for _ in range(count - 1))]


def product_of(x: Tensor, shape: Shape) -> Callable[[W4Weight], Tensor]:
    if shape.gated:
        return lambda weight: w4.gated_linear_w4(x, weight)
    return lambda weight: w4.linear_w4(x, weight, None)


def report(shapes: list[Shape], counts: list[int]) -> None:
    print("rows x columns | tokens | us | GB/s | of 4.3 TB/s | TFLOP/s\n---|---|---|---|---|---")
    for shape in shapes:
        copies = rotated(shape)
        for tokens in counts:
            x = activations(tokens, shape.columns)
            taken = seconds(product_of(x, shape), copies)
            rate = weight_bytes(copies[0]) / taken
            flops = 2 * tokens * shape.rows * shape.columns / taken
            print(
                f"{shape.rows} x {shape.columns}{' gated' * shape.gated} | {tokens} | "
                f"{taken * 1e6:.2f} | {rate / 1e9:.0f} | {rate / COPY_BANDWIDTH:.0%} | "
                f"{flops / 1e12:.0f}",
                flush=True,
            )


def chain(model: str, counts: list[int]) -> None:
    """A token's matrices in all layers, each the input of the next, in one graph."""
    layers = [[random_weight(shape) for shape in MODELS[model]] for _ in range(LAYERS[model])]
    hidden = MODELS[model][0].columns
    total = sum(weight_bytes(weight) for layer in layers for weight in layer)
    for tokens in counts:
        x = activations(tokens, hidden)

        def work(x: Tensor = x) -> Tensor:
            for qkv, out, gate_up, down in layers:
                x = w4.linear_w4(x, qkv, None)[:, :hidden]
                x = w4.linear_w4(x, out, None)
                x = w4.gated_linear_w4(x, gate_up)
                x = w4.linear_w4(x, down, None)
            return x

        taken = graph_seconds(work)
        print(
            f"{model}, {len(layers)} layers, {tokens} tokens: {taken * 1e3:.3f} ms, "
            f"{total / taken / 1e9:.0f} GB/s, {total / taken / COPY_BANDWIDTH:.0%}",
            flush=True,
        )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["llama-2-7b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 128, 512, 2048])
    parser.add_argument("--buckets", nargs="+", type=int, default=list(HOPPER_BUCKETS))
    parser.add_argument("--tune", type=Path)
    parser.add_argument("--patience", type=float, default=1e6, help="seconds for compiling")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    shapes = list(dict.fromkeys(shape for model in given.models for shape in MODELS[model]))
    if given.tune:
        tune(shapes, given.buckets, given.tune, given.patience)
        return
    report(shapes, given.tokens)
    for model in given.models:
        chain(model, [count for count in given.tokens if count <= 128])


if __name__ == "__main__":
    main(sys.argv[1:])
