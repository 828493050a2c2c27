"""The GPU's attention against the reference: on a GPU, or else in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.ops.gpu_device import DEVICE, ON_GPU  # isort: skip  (before triton)
import kernels.gpu as gpu
import kernels.reference
from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.decode_rows import decode_rows
from kernels.gpu.kv_store import rope_and_store
from kernels.gpu.prefill_attention import prefill_attention
from kernels.ops import AttentionMetadata, KVCache
from tests.ops.paged_batches import layout, quantized, random_tensors

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SIMPLE = [(1, 33), (1, 70), (1, 1)]
MIXED = [(1, 40), (1, 7), (9, 9), (5, 50), (1, 20)]
# Query heads, KV heads and their size; alone means that a KV head serves one query head.
GROUPED, ALONE = (4, 2, 32), (2, 2, 32)


def with_prompts(
    heads: tuple[int, int, int], decodes: list[tuple[int, int]], prompts: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """A batch of both; interpreted, prompts come once: they have no other kernel where heads are
    ALONE, and `test_groups_and_head_sizes` has such, too."""
    return [*decodes, *prompts] if ON_GPU or heads == GROUPED else decodes


class Case:
    """A batch on the device: sequences are (new tokens, all tokens), decodes first."""

    def __init__(
        self,
        sequences: list[tuple[int, int]],
        decodes: int,
        heads: tuple[int, int, int] = (4, 2, 32),
        dtype: torch.dtype = torch.float16,
        bits: int = 16,
        static: bool = False,
        block_size: int = 64,
        rotary_dim: int | None = None,
        seed: int = 0,
    ) -> None:
        query_lens, seq_lens = [list(lens) for lens in zip(*sequences, strict=True)]
        metadata, slots = layout(query_lens, seq_lens, block_size, scattered=True, seed=seed)
        self.tokens = sum(query_lens)
        q, plain = random_tensors(self.tokens, slots, heads, dtype, seed)
        cache = plain if bits == 16 else quantized(plain, bits, static)
        generator = torch.Generator().manual_seed(seed + 1)
        k, v = torch.randn(2, self.tokens, *heads[1:], generator=generator).to(dtype)
        angles = torch.randn(self.tokens, (rotary_dim or heads[2]) // 2, generator=generator)
        angles = torch.cat((angles, angles), -1)
        self.inputs = [x.to(DEVICE) for x in (q, k, v, angles.cos(), angles.sin())]
        self.scale = heads[2] ** -0.5
        self.dtype = dtype
        self.metadata = replace(
            metadata,
            num_decodes=decodes,
            max_query_len=max(query_lens[decodes:], default=0),
            max_seq_len=max(seq_lens),
            **{
                name: getattr(metadata, name).to(DEVICE)
                for name in ("slot_mapping", "block_table", "cu_seqlens_q", "seq_lens_k")
            },
        )
        self.cache = KVCache(
            cache.k.to(DEVICE), cache.v.to(DEVICE), bits,
            None if bits == 16 else cache.k_params.to(DEVICE),
            None if bits == 16 else cache.v_params.to(DEVICE),
            static,
        )  # fmt: skip

    def copy_of_cache(self) -> KVCache:
        changes = {"k": self.cache.k.clone(), "v": self.cache.v.clone()}
        if self.cache.bits < 16 and not self.cache.static:
            changes["k_params"] = self.cache.k_params.clone()
            changes["v_params"] = self.cache.v_params.clone()
        return replace(self.cache, **changes)

    def poisoned_cache(self) -> KVCache:
        """NaN wherever no older token of the batch lies."""
        cache = self.copy_of_cache()
        keep = torch.zeros(cache.k.shape[1], dtype=torch.bool)
        for runs in self.metadata.kv_runs:
            for first, length in runs:
                keep[first : first + length] = True
        keep[self.metadata.slot_mapping[self.metadata.slot_mapping >= 0].cpu()] = False
        spoil = (~keep).to(DEVICE)
        if cache.bits == 16:
            cache.k[:, spoil], cache.v[:, spoil] = torch.nan, torch.nan
        elif not cache.static:
            cache.k_params[:, spoil], cache.v_params[:, spoil] = torch.nan, torch.nan
        return cache

    def expect(self, window: int | None = None) -> tuple[torch.Tensor, KVCache]:
        cache = self.copy_of_cache()
        out = kernels.reference.attention(*self.inputs, cache, self.metadata, self.scale, window)
        return out, cache

    def check(self, window: int | None = None) -> None:
        cache = self.poisoned_cache()
        out = gpu.attention(*self.inputs, cache, self.metadata, self.scale, window)
        self.compare(out, cache, window)

    def compare(self, out: torch.Tensor, cache: KVCache, window: int | None) -> None:
        """The pools against the reference's, then the output against the reference over them.

        An element that is rounded to another step of 4 bits moves the output by percents.
        """
        _, expected_cache = self.expect(window)
        q, k, _, cos, sin = self.inputs
        q, _ = kernels.reference.rotary_embedding(q, k, cos, sin)
        expected = kernels.reference.paged_attention(q, cache, self.metadata, self.scale, window)
        assert out.dtype == self.dtype and out.shape == expected.shape
        tolerance = max(TOLERANCE[self.dtype], 2e-5 if cache.bits == 16 else 3e-3)
        torch.testing.assert_close(out, expected, atol=tolerance, rtol=1e-2)
        new = self.metadata.slot_mapping
        for name in ("k", "v"):
            got, wanted = getattr(cache, name)[:, new], getattr(expected_cache, name)[:, new]
            # A rotated key may be rounded up or down; the interpreter cuts bfloat16 off.
            coarse = self.dtype == torch.bfloat16
            if cache.bits == 16:
                rtol = 8e-3 if coarse else 1e-3
                torch.testing.assert_close(got, wanted, atol=1e-5, rtol=rtol)
                continue
            params = [None, None]
            for i, one in enumerate((cache, expected_cache)):
                params[i] = getattr(one, f"{name}_params")[:, new]
            rounding = 3e-2 if coarse else 3e-3
            torch.testing.assert_close(*params, atol=rounding, rtol=2e-3)
            got, wanted = (
                kernels.reference.dequantize_kv(values, param, cache.bits)
                for values, param in zip((got, wanted), params, strict=True)
            )
            step = params[1][..., :1].float()
            assert ((got - wanted).abs() <= 1.01 * step + rounding).all()
            assert (got - wanted).abs().mean() < 0.02 * step.mean() + rounding / 3


@pytest.mark.parametrize("heads", [GROUPED, ALONE])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_decode(dtype, bits, heads):
    Case(SIMPLE, 3, heads, dtype, bits).check()


@pytest.mark.parametrize("heads", [GROUPED, ALONE] if ON_GPU else [GROUPED])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_decode_and_prefill_in_one_batch(dtype, bits, heads):
    Case(MIXED, 2, heads, dtype, bits).check()


@pytest.mark.parametrize("bits", [8, 4])
def test_static_parameters_are_read_and_kept(bits):
    case = Case(MIXED, 2, bits=bits, static=True)
    before = case.cache.k_params.clone()
    case.check()
    assert torch.equal(case.cache.k_params, before)


@pytest.mark.parametrize("heads", [GROUPED, ALONE])
@pytest.mark.parametrize("window", [1, 5, 64])
@pytest.mark.parametrize("bits", [16, 4])
def test_sliding_window(window, bits, heads):
    # A window of 1 leaves a whole tile of the last prompt's keys out. More than one tile of its
    # tokens: on a GPU, and in `test_batch_invariant_bits`.
    batch = with_prompts(heads, [(1, 90), (1, 3)], [(9, 12), (40, 90) if ON_GPU else (20, 90)])
    Case(batch, 2, heads, bits=bits).check(window)


@pytest.mark.parametrize(
    "heads", [(1, 1, 16), (3, 3, 80), (7, 1, 96), (40, 2, 16), (2, 1, 64), (2, 2, 256)]
)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_groups_and_head_sizes(heads, bits):
    Case([(1, 35), (6, 38)], 1, heads=heads, bits=bits).check()


@pytest.mark.parametrize("heads", [GROUPED, ALONE])
@pytest.mark.parametrize("block_size", [8, 16, 128])
@pytest.mark.parametrize("bits", [16, 8])
def test_block_sizes(block_size, bits, heads):
    batch = with_prompts(heads, MIXED[:2], MIXED[2:])
    Case(batch, 2, heads, bits=bits, block_size=block_size).check()


@pytest.mark.parametrize("heads", [GROUPED, ALONE])
@pytest.mark.parametrize("bits", [16, 8])
def test_part_of_a_head_is_rotated(bits, heads):
    batch = with_prompts(heads, MIXED[:2], MIXED[2:])
    Case(batch, 2, heads, bits=bits, rotary_dim=8).check()


SPLIT = [
    *[((6, 2, 32), bits, decode_attention, (16, 4, 2, 0)) for bits in (16, 8, 4)],
    *[(ALONE, bits, decode_rows, (4, 1, True, 0)) for bits in (16, 8)],
    *[(ALONE, bits, decode_rows, (2, 2, True, 0)) for bits in (16, 8)],
    *[(ALONE, 8, decode_rows, (8, warps, True, 0)) for warps in (1, 2)],
]


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize(("heads", "bits", "attend", "config"), SPLIT)
def test_splits_are_added_up_and_the_counters_left_at_zero(heads, bits, attend, config, window):
    case = Case([(1, 145), (1, 1), (1, 64)], 3, heads, bits=bits)
    for _ in range(2):  # the second finds the first's workspace
        cache = case.poisoned_cache()
        out = torch.full_like(case.inputs[0], torch.nan)
        attend(
            out, *case.inputs, cache, case.metadata, case.scale, window, splits=(5, 1),
            config=config,
        )  # fmt: skip
        case.compare(out, cache, window)
    (workspace,) = case.metadata.derived.values()
    assert not workspace[2].any()


@pytest.mark.parametrize("heads", [GROUPED, ALONE])
@pytest.mark.parametrize("splits", [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("bits", [16, 8])
def test_a_graph_reads_lengths_and_slots_anew(bits, splits, heads):
    case = Case([(1, 140), (1, 70)], 2, heads, bits=bits)
    metadata, cache = case.metadata, case.copy_of_cache()
    out = torch.empty_like(case.inputs[0])

    def launch() -> None:
        decode_attention(out, *case.inputs, cache, metadata, case.scale, splits=splits)

    launch()
    replay = launch
    if DEVICE.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        replay = graph.replay
    metadata.seq_lens_k.copy_(torch.tensor([50, 71]))
    metadata.slot_mapping.copy_(
        torch.stack([metadata.block_table[0, 0] * 64 + 49, metadata.block_table[1, 1] * 64 + 6])
    )
    case.metadata = replace(metadata, seq_lens=[50, 71])
    for _ in range(2):
        out.fill_(torch.nan)
        replay()
        case.compare(out, cache, None)


def test_the_host_chooses_more_splits_for_a_small_batch():
    from kernels.gpu.splits import choose_splits

    assert choose_splits(1, 32, 600, 64, 132) == (10, 1)
    assert choose_splits(4, 32, 4352, 64, 132) == (4, 3)
    assert choose_splits(1, 8, 4352, 64, 132) == (32, 1)
    assert choose_splits(8, 32, 4352, 64, 132)[0] == 1
    assert choose_splits(16, 32, 4352, 64, 132)[0] == 1
    assert choose_splits(16, 32, 32768, 64, 132) == (4, 15)  # one alone would take too long
    assert choose_splits(1, 8, 1, 64, 132) == (1, 1)


@pytest.mark.parametrize("heads", [GROUPED, ALONE])
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("bits", [16, 8])
def test_padding_of_a_graph_touches_no_pool(bits, invariant, heads):
    case = Case([(1, 33), (1, 5), (1, 9)], 3, heads, bits=bits)
    expected, _ = case.expect()
    metadata = replace(case.metadata, batch_invariant=invariant)
    metadata.seq_lens_k[1:] = 0
    metadata.slot_mapping[1:] = -1
    metadata.block_table[1:] = 0
    cache, before = case.copy_of_cache(), case.copy_of_cache()
    out = gpu.attention(*case.inputs, cache, metadata, case.scale)
    torch.testing.assert_close(out[0], expected[0], atol=3e-3, rtol=1e-2)
    assert torch.isfinite(out).all()
    slot = metadata.slot_mapping[0]
    before.k[:, slot], before.v[:, slot] = cache.k[:, slot], cache.v[:, slot]
    assert torch.equal(cache.k, before.k) and torch.equal(cache.v, before.v)


def one_sequence(case: Case, index: int, first: int, last: int) -> AttentionMetadata:
    """Tokens first..last of a sequence's positions, alone, in the same pools."""
    whole = case.metadata
    seq_len, query_len = whole.seq_lens[index], whole.query_lens[index]
    start = int(whole.cu_seqlens_q[index]) + first - (seq_len - query_len)
    count = last - first
    return replace(
        whole,
        slot_mapping=whole.slot_mapping[start : start + count],
        block_table=whole.block_table[index : index + 1],
        cu_seqlens_q=torch.tensor([0, count], dtype=torch.int32, device=DEVICE),
        seq_lens_k=torch.tensor([last], dtype=torch.int32, device=DEVICE),
        query_lens=[count], seq_lens=[last], kv_runs=[],
        num_decodes=int(count == 1), max_query_len=0 if count == 1 else count, max_seq_len=last,
        batch_invariant=True, derived={},
    )  # fmt: skip


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("window", [None, 21])
def test_batch_invariant_bits(bits, window):
    case = Case([(1, 40), (70, 70), (5, 50)], 1, bits=bits)
    together = gpu.attention(
        *case.inputs, case.copy_of_cache(), replace(case.metadata, batch_invariant=True),
        case.scale, window,
    )  # fmt: skip
    expected, _ = case.expect(window)
    torch.testing.assert_close(together, expected, atol=3e-3, rtol=1e-2)
    cuts = {0: [39, 40], 1: [0, 1, 20, 64, 69, 70], 2: [45, 50]}
    for index, cut in cuts.items():
        cache = case.copy_of_cache()
        begin = int(case.metadata.cu_seqlens_q[index])
        offset = begin - cut[0]
        parts = []
        for first, last in zip(cut, cut[1:]):
            inputs = [x[offset + first : offset + last] for x in case.inputs]
            alone = one_sequence(case, index, first, last)
            parts.append(gpu.attention(*inputs, cache, alone, case.scale, window))
        end = int(case.metadata.cu_seqlens_q[index + 1])
        assert torch.equal(torch.cat(parts), together[begin:end])


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_store_and_read_apart(bits):
    case = Case(MIXED, 0, bits=bits)
    q, k, v, cos, sin = case.inputs
    q, k = kernels.reference.rotary_embedding(q, k, cos, sin)
    cache = case.poisoned_cache()
    gpu.store_kv(k, v, cache, case.metadata.slot_mapping)
    out = gpu.paged_attention(q, cache, case.metadata, case.scale)
    case.compare(out, cache, None)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block_size", [16, 64])
def test_a_long_prompt_reads_a_copy_of_quantized_kv(block_size, bits, dtype):
    case = Case(MIXED, 2, bits=bits, dtype=dtype, block_size=block_size)
    q, k, v, cos, sin = case.inputs
    cache = case.poisoned_cache()
    rope_and_store(k, v, (cos, sin), cache, case.metadata.slot_mapping)
    out = torch.full_like(q, torch.nan)
    for first in (2, 0):
        prefill_attention(
            out, q, (cos, sin), cache, case.metadata, case.scale, first_sequence=first,
            unpack_first=True,
        )  # fmt: skip
        assert torch.isnan(out[:2]).all() == (first == 2)
    case.compare(out, cache, None)


def test_inputs_may_be_views_of_one_product():
    case = Case(MIXED, 2)
    q, k, v, cos, sin = case.inputs
    product = torch.cat((q, k, v), 1).flatten(1)
    parts = product.split([128, 64, 64], 1)
    case.inputs = [part.unflatten(1, (-1, 32)) for part in parts] + [cos, sin]
    case.check()


@pytest.mark.parametrize("change", [{"bits": 5}, {"v": torch.zeros(2, 3, 32)}])
def test_what_the_kernels_do_not_serve_is_refused(change):
    case = Case(SIMPLE, 3)
    with pytest.raises(ValueError):
        gpu.attention(
            *case.inputs, replace(case.cache, **change), case.metadata, case.scale
        )
