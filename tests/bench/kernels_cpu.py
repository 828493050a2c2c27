"""Products of a Llama-2-7B layer on a CPU: bfloat16, 4 bits (group 128), 8 bits by 8 bits.

    python -m tests.bench.kernels_cpu [--rows 1 8 64 512] [--threads 2] [--repeats 9]

Milliseconds a layer for so many rows: the fastest of the repeats, and the median after it. The
formats take turns, so that another program's load falls on all; weights rotate past the cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.cpu.linear_w4 import linear_w4, pack
from kernels.cpu.linear_w8 import linear_w8, reorder
from kernels.packing import W8Weight

# Outputs, inputs: qkv, o, gate and up, down. A layer of 101 MB in 4 bits is larger than a cache.
SHAPES = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]
GROUP = 128
Product = Callable[[Tensor], Tensor]


def bfloat16(outputs: int, inputs: int) -> Product:
    plain = torch.empty(outputs, inputs, dtype=torch.bfloat16).normal_(0, 0.02)
    weight = torch.ops.mkldnn._reorder_linear_weight(plain)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def w4(outputs: int, inputs: int) -> Product:
    q = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
    groups = (outputs, inputs // GROUP)
    zeros = torch.randint(0, 16, groups, dtype=torch.uint8)
    weight = pack(q, torch.full(groups, 0.003), zeros, GROUP)
    return lambda x: linear_w4(x, weight, None)


def w8a8(outputs: int, inputs: int) -> Product:
    q = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    weight = reorder(W8Weight(q, torch.full((outputs,), 0.0003)))
    return lambda x: linear_w8(x, weight, None)


FORMATS = {"bfloat16": bfloat16, "W4": w4, "W8A8": w8a8}


def measure(layers: dict[str, list[Product]], rows: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each repeat by format, after one that is not counted."""
    inputs = [torch.randn(rows, columns).bfloat16() for _, columns in SHAPES]
    times: dict[str, list[float]] = {name: [] for name in layers}
    for repeat in range(repeats + 1):
        for name, products in layers.items():
            start = time.perf_counter()
            for product, x in zip(products, inputs, strict=True):
                product(x)
            if repeat:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    able = [name for name, has in torch.cpu.get_capabilities().items() if has is True]
    chosen = [name for name in able if name.startswith(("amx", "avx512_vnni", "avx512_bf16"))]
    print(f"torch {torch.__version__}, {args.threads} threads, {' '.join(chosen) or 'none'}")
    layers = {name: [make(*shape) for shape in SHAPES] for name, make in FORMATS.items()}
    print(f"| rows | {' | '.join(f'{name} ms: least (median)' for name in FORMATS)} |")
    print("|---" * (len(FORMATS) + 1) + "|")
    with torch.inference_mode():
        for rows in args.rows:
            times = measure(layers, rows, args.repeats)
            cells = [f"{min(t):.1f} ({statistics.median(t):.1f})" for t in times.values()]
            print(f"| {rows} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
