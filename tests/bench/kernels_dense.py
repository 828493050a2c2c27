"""Times of the norms, the 16-bit and int8 products, sampling and rounding on a GPU, beside torch's.

    python -m tests.bench.kernels_dense [--only products chain sampling norms rounding]

Each figure is a launch of a CUDA graph of at least 20 that rotates over enough copies of the
weights to miss the cache, the median of several replays.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gpu.elementwise import add_rms_norm, rms_norm, silu_and_mul
from kernels.gpu.linear import linear
from kernels.gpu.linear_w8 import linear_w8
from kernels.gpu.rounding import round_columns
from kernels.gpu.sampling import sample
from kernels.packing import W8Weight

# Rows, columns of Llama-2-7B's matrices (qkv, o, gate and up, down, head) and of Llama-3's head.
SHAPES = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (32000, 4096), (128256, 4096)]
LAYERS = 32
REPLAYS = 9
LAUNCHES = 20
ROTATED_BYTES = 250_000_000  # four times an H200's cache


def drawn(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return (torch.randn(*shape, device="cuda") * 0.02).to(dtype)


def microseconds(work: list[Callable[[], object]]) -> float:
    """Median time of one call, each of them captured in turn until there are enough."""
    for call in work[:2]:
        call()
    torch.cuda.synchronize()
    rounds = -(-LAUNCHES // len(work))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for _ in range(rounds) for call in work]
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(kept))
    return statistics.median(times)


def copies(size: int) -> range:
    return range(max(3, -(-ROTATED_BYTES // size)))


def products() -> Iterator[str]:
    yield "| rows x columns | T | ours µs (TB/s) | invariant | cuBLAS | W8 µs (TB/s) |"
    yield "|---|---|---|---|---|---|"
    for rows, columns in SHAPES:
        weights = [drawn(rows, columns) for _ in copies(2 * rows * columns)]
        packed = [
            W8Weight(
                torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device="cuda"),
                torch.rand(rows, device="cuda"),
            )
            for _ in copies(rows * columns)
        ]
        for tokens in (1, 4, 16, 64, 2048):
            x = drawn(tokens, columns)
            times = [
                microseconds([partial(linear, x, w, None) for w in weights]),
                microseconds([partial(linear, x, w, None, True) for w in weights]),
                microseconds([partial(F.linear, x, w) for w in weights]),
                microseconds([partial(linear_w8, x, w, None) for w in packed]),
            ]
            size, activations = rows * columns, 2 * tokens * (rows + columns)
            rate = (2 * size + activations) / times[0] / 1e6
            rate_w8 = (size + activations) / times[3] / 1e6
            yield (
                f"| {rows} x {columns} | {tokens} | {times[0]:.1f} ({rate:.2f}) | {times[1]:.1f}"
                f" | {times[2]:.1f} | {times[3]:.1f} ({rate_w8:.2f}) |"
            )


def chain() -> Iterator[str]:
    """All matrices of Llama-2-7B, one after another, as a step reads them."""
    layers = [[drawn(*shape) for shape in SHAPES[:4]] for _ in range(LAYERS)]
    head = drawn(*SHAPES[4])

    def step(x: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        for qkv, o, gate_up, down in layers:
            x = product(product(x, qkv)[:, :4096], o)
            x = product(product(x, gate_up)[:, :11008], down)
        return product(x, head)

    yield "| T | ours, ms for 32 layers and head | cuBLAS |"
    yield "|---|---|---|"
    for tokens in (1, 4, 8, 16, 64):
        x = drawn(tokens, 4096)
        ours = microseconds([partial(step, x, partial(linear, bias=None))])
        theirs = microseconds([partial(step, x, F.linear)])
        yield f"| {tokens} | {ours / 1e3:.3f} | {theirs / 1e3:.3f} |"


def sampling() -> Iterator[str]:
    cases = {
        "greedy": (0.0, 1 << 40, 1.0, 0.0),
        "all": (1.0, 1 << 40, 1.0, 0.0),
        "top_k 50": (1.0, 50, 1.0, 0.0),
        "top_p 0.9": (1.0, 1 << 40, 0.9, 0.0),
        "both": (0.8, 50, 0.9, 0.0),
        "min_p 0.05": (1.0, 1 << 40, 1.0, 0.05),
    }
    yield f"| vocab | rows | {' | '.join(cases)} | torch.argmax |"
    yield "|---" * (len(cases) + 3) + "|"
    for vocab in (32000, 128256):
        for rows in (1, 64, 256):
            logits = [torch.randn(rows, vocab, device="cuda") * 2.5 for _ in range(4)]
            uniform = torch.rand(rows, device="cuda")
            times = []
            for temperature, top_k, top_p, min_p in cases.values():
                row = torch.ones(rows, device="cuda")
                columns = (row * temperature, (row * top_k).long(), row * top_p, row * min_p)
                times.append(microseconds([partial(sample, x, *columns, uniform) for x in logits]))
            times.append(microseconds([partial(torch.argmax, x, -1) for x in logits]))
            yield f"| {vocab} | {rows} | " + " | ".join(f"{t:.1f}" for t in times) + " |"


def norms() -> Iterator[str]:
    yield "| T | rms_norm µs | add_rms_norm | silu_and_mul | heads' norm |"
    yield "|---|---|---|---|---|"
    weight, head_weight = drawn(4096), drawn(128)
    for tokens in (1, 64, 2048):
        xs = [drawn(tokens, 4096) for _ in range(12)]
        residual, gates = drawn(tokens, 4096), [drawn(tokens, 22016) for _ in range(4)]
        fused = [drawn(tokens, 40, 128) for _ in range(12)]
        times = [
            microseconds([partial(rms_norm, x, weight, 1e-5) for x in xs]),
            microseconds([partial(add_rms_norm, x, residual, weight, 1e-5) for x in xs]),
            microseconds([partial(silu_and_mul, x) for x in gates]),
            microseconds([partial(rms_norm, x[:, :32], head_weight, 1e-5) for x in fused]),
        ]
        yield f"| {tokens} | " + " | ".join(f"{t:.2f}" for t in times) + " |"


def rounding() -> Iterator[str]:
    yield "| outputs | 128 columns rounded, µs |"
    yield "|---|---|"
    factor = torch.eye(128, device="cuda") + drawn(128, 128, dtype=torch.float32).triu(1)
    for outputs in (4096, 12288, 22016):
        scales, zeros = (torch.full((1, outputs), v, device="cuda") for v in (0.01, 8.0))
        weights = [drawn(128, outputs, dtype=torch.float32) for _ in range(4)]
        time = microseconds([partial(round_columns, w, factor, scales, zeros, 15) for w in weights])
        yield f"| {outputs} | {time:.1f} |"


def main() -> None:
    tables = {
        "products": products, "chain": chain, "sampling": sampling, "norms": norms,
        "rounding": rounding,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(tables), default=list(tables))
    for name in parser.parse_args().only:
        for line in tables[name]():
            print(line, flush=True)
        print()


if __name__ == "__main__":
    main()
