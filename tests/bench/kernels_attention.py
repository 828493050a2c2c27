"""Times of the GPU's attention: microseconds, KV bytes read a second, operations a second.

    python -m tests.bench.kernels_attention [--only decode prefill] [--tune] [--compile]

CUDA graphs of launches that rotate over pools larger than the L2 cache, random data, median of
several replays. `--tune` times tile sizes; `--compile` only compiles what would be timed, in
parallel processes, into Triton's cache.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Callable
from itertools import product

import torch

from kernels.gpu import attention
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.decode_rows import decode_rows
from kernels.gpu.kv_store import rope_and_store
from kernels.gpu.prefill_attention import prefill_attention
from kernels.ops import AttentionMetadata, KVCache

D, BLOCK = 128, 64
SHAPES = [(32, 32), (32, 8)]
BITS = [16, 8, 4]
DECODE = [(b, c) for b in (1, 4, 16, 64, 256) for c in (257, 600, 2048)]
TUNE_DECODE = [(1, 300), (1, 600), (64, 600)]
DECODE_CONFIGS = [(64, 2, 3, 0), (64, 4, 3, 0), (64, 2, 2, 0), (32, 2, 3, 0), (32, 1, 3, 0)]
# Of `decode_rows`, which serves KV heads with one query head, of 16 and 8 bits.
ROWS_CONFIGS = [(4, 2, True, 0), (4, 1, True, 0), (8, 2, True, 0), (8, 1, True, 0)]
PREFILL = [512, 2048, 4000]
PREFILL_CONFIGS = [None, (64, 64, 4, 2), (128, 64, 8, 3), (32, 64, 4, 3), (32, 64, 2, 3)]
L2_BYTES = 60e6


def random_cache(kv_heads: int, slots: int, bits: int) -> KVCache:
    if bits == 16:
        k, v = (torch.randn(kv_heads, slots, D, device="cuda").half() for _ in range(2))
        return KVCache(k, v)
    width = D * bits // 8
    k, v = (
        torch.randint(256, (kv_heads, slots, width), dtype=torch.uint8, device="cuda")
        for _ in range(2)
    )
    params = torch.tensor([4 / 2**bits, -2.0], dtype=torch.float16, device="cuda")
    params = params.repeat(kv_heads, slots, 1)
    return KVCache(k, v, bits, params, params.clone())


def batch(query_lens: list[int], seq_lens: list[int]) -> tuple[AttentionMetadata, int]:
    """Metadata with the blocks of all sequences shuffled, and the number of slots."""
    sequences, width = len(seq_lens), -(-max(seq_lens) // BLOCK)
    table = torch.randperm(sequences * width).view(sequences, width)
    slots = [
        int(table[s, p // BLOCK]) * BLOCK + p % BLOCK
        for s in range(sequences)
        for p in range(seq_lens[s] - query_lens[s], seq_lens[s])
    ]
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    decodes = sequences if max(query_lens) == 1 else 0
    metadata = AttentionMetadata(
        torch.tensor(slots).cuda(), table.int().cuda(), starts.int().cuda(),
        torch.tensor(seq_lens, dtype=torch.int32).cuda(), query_lens, seq_lens, [], BLOCK,
        num_decodes=decodes, max_query_len=0 if decodes else max(query_lens),
        max_seq_len=max(seq_lens),
    )  # fmt: skip
    return metadata, sequences * width * BLOCK


def inputs(tokens: int, heads: tuple[int, int]) -> list[torch.Tensor]:
    qkv = torch.randn(tokens, heads[0] + 2 * heads[1], D, device="cuda").half()
    angles = torch.randn(tokens, D, device="cuda")
    return [*qkv.split([heads[0], heads[1], heads[1]], 1), angles.cos(), angles.sin()]


def microseconds(work: Callable[[int], object], launches: int = 20, repeats: int = 9) -> float:
    work(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            work(i)
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / launches)
    return statistics.median(times)


def decode(
    heads: tuple[int, int], bits: int, sequences: int, length: int, config: tuple | None = None
) -> tuple[float, float]:
    """Microseconds, and GB/s of the bytes of KV."""
    metadata, slots = batch([1] * sequences, [length] * sequences)
    size = 2 * sequences * length * heads[1] * (D * bits // 8 + (4 if bits < 16 else 0))
    copies = min(20, max(1, -int(-4 * L2_BYTES // size)))
    caches = [random_cache(heads[1], slots, bits) for _ in range(copies)]
    q, k, v, cos, sin = inputs(sequences, heads)
    out = torch.empty(sequences, heads[0], D, dtype=q.dtype, device="cuda")

    def work(i: int) -> None:
        cache = caches[i % copies]
        attend = decode_rows if config in ROWS_CONFIGS else decode_attention
        attend(out, q, k, v, cos, sin, cache, metadata, D**-0.5, config=config)

    spent = microseconds(work)
    return spent, size / spent / 1e3


def prefill(
    heads: tuple[int, int], bits: int, tokens: int, config: tuple | None = None
) -> tuple[float, float, float]:
    """Microseconds of the op, of its attention kernel, and that kernel's TFLOP/s."""
    metadata, slots = batch([tokens], [tokens])
    cache = random_cache(heads[1], slots, bits)
    tensors = inputs(tokens, heads)
    rope_and_store(*tensors[1:3], tuple(tensors[3:]), cache, metadata.slot_mapping)
    out = torch.empty(tokens, heads[0], D, dtype=torch.float16, device="cuda")
    rotary, scale = (tensors[3], tensors[4]), D**-0.5
    alone = microseconds(
        lambda i: prefill_attention(
            out, tensors[0], rotary, cache, metadata, scale, config=config,
            unpack_first=config is None,
        )  # fmt: skip
    )
    whole = 0.0
    if config is None:
        whole = microseconds(lambda i: attention(*tensors, cache, metadata, scale))
    return whole, alone, 2 * tokens**2 * D * heads[0] / alone / 1e6


def cases(only: list[str], tune: bool) -> list[tuple]:
    found: list[tuple] = []
    if "decode" in only:
        sizes = TUNE_DECODE if tune else DECODE
        configs = DECODE_CONFIGS if tune else [None]
        found += [("decode", *c) for c in product(SHAPES, BITS, sizes, configs)]
        if tune:
            found += [("decode", *c) for c in product(SHAPES[:1], BITS[:2], sizes, ROWS_CONFIGS)]
    if "prefill" in only:
        sizes = [2048] if tune else PREFILL
        configs = PREFILL_CONFIGS if tune else [None]
        shapes = SHAPES[:1] if tune else SHAPES
        found += [("prefill", *c) for c in product(shapes, BITS, sizes, configs)]
    return found


def run(case: tuple) -> str:
    kind, heads, bits, size, config = case
    name = f"{kind:8} {heads[0]}/{heads[1]:<3} kv{bits:<3} {size!s:12} {config or ''!s:16}"
    try:
        if kind == "decode":
            spent, rate = decode(heads, bits, *size, config)
            return f"{name} {spent:9.2f} us {rate:7.0f} GB/s"
        whole, alone, rate = prefill(heads, bits, size, config)
        return f"{name} {alone:9.2f} us {rate:7.0f} TFLOP/s, the op {whole:.1f} us"
    except Exception as error:  # of one tile size among many: too much shared memory, say
        return f"{name} {type(error).__name__}: {str(error)[:80]}"


def compile_one(case: tuple) -> None:
    kind, heads, bits, _, config = case
    if kind == "decode":
        for sequences in (1, 140):  # with splits and without
            decode(heads, bits, sequences, 200, config)
    else:
        prefill(heads, bits, 256, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=["decode", "prefill"])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    wanted = cases(args.only, args.tune)
    if args.compile:
        # The size makes no other kernel.
        kinds = list({(*case[:3], case[4]): case for case in wanted}.values())
        with multiprocessing.get_context("spawn").Pool(10) as pool:
            pool.map(compile_one, kinds, chunksize=1)
        return
    print(torch.cuda.get_device_name(), torch.__version__)
    for case in wanted:
        print(run(case), flush=True)


if __name__ == "__main__":
    main()
