"""What the inputs of a model's layers look like over calibration text, observed block by block.

Memory holds one block, the hidden states of all samples up to a bound (the rest lies on disk), and
what is kept of each layer. The result is `quantize.stats`'s one file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from backend.errors import UserError
from backend.models.decoder import DecoderLayer
from backend.models.loader import is_finite
from backend.tokenizer import Tokenizer
from quantize.blocks import BlockModel, observed_inputs
from quantize.data import load_samples
from quantize.hidden_store import HiddenStore, in_batches
from quantize.progress import Progress
from quantize.stats import (
    CalibrationInfo,
    CalibrationStats,
    ChannelStats,
    LinearStats,
    fingerprint,
    run_length,
    sample_stride,
)

BATCH_TOKENS = 8192  # run at a time unless asked otherwise: enough for a GPU's largest products


class Observer:
    """Gathers ChannelStats over batches of tokens. Sums are float32 in a batch, then float64."""

    low: Tensor
    high: Tensor
    sum: Tensor
    abs_sum: Tensor

    def __init__(self) -> None:
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """x [T, ...]: T more tokens, of any float dtype."""
        found = (
            x.amin(0).float(),
            x.amax(0).float(),
            x.sum(0, dtype=torch.float32).double(),
            x.abs().sum(0, dtype=torch.float32).double(),
        )
        self._merge(found, x.shape[0])

    def merge(self, other: Observer) -> None:
        """Count what `other` has seen too."""
        self._merge((other.low, other.high, other.sum, other.abs_sum), other.tokens)

    def _merge(self, found: tuple[Tensor, Tensor, Tensor, Tensor], tokens: int) -> None:
        low, high, total, abs_total = found
        if self.tokens:
            low, high = torch.minimum(self.low, low), torch.maximum(self.high, high)
            total, abs_total = self.sum + total, self.abs_sum + abs_total
        self.low, self.high, self.sum, self.abs_sum = low, high, total, abs_total
        self.tokens += tokens

    def stats(self) -> ChannelStats:
        """Of all that was seen, on the CPU."""
        return ChannelStats(
            min=self.low.cpu(),
            max=self.high.cpu(),
            absmax=torch.maximum(self.low.abs(), self.high.abs()).cpu(),
            mean=(self.sum / self.tokens).float().cpu(),
            absmean=(self.abs_sum / self.tokens).float().cpu(),
        )


class LinearObserver(Observer):
    """Gathers LinearStats; in it tokens are [C].

    Args:
        stride: one token of so many is kept.
        start: tokens that were seen before the first one here.
    """

    gram: Tensor  # [C / run, run, run], summed in float32

    def __init__(self, stride: int, start: int = 0) -> None:
        super().__init__()
        self._stride, self._start = stride, start
        self.kept: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """x [T, C]: T more tokens, of any float dtype."""
        seen = self._start + self.tokens
        self.kept.append(x[-seen % self._stride :: self._stride].to("cpu", copy=True))
        runs = x.float().unflatten(1, (-1, run_length(x.shape[1]))).transpose(0, 1)
        self._add(runs.transpose(1, 2) @ runs)
        super().update(x)

    def merge(self, other: Observer) -> None:
        """Count what `other` has seen too, which began where this one ends."""
        assert isinstance(other, LinearObserver)
        self.kept += other.kept
        self._add(other.gram)
        super().merge(other)

    def _add(self, gram: Tensor) -> None:
        self.gram = self.gram + gram if self.tokens else gram

    def stats(self) -> LinearStats:
        """Of all that was seen, on the CPU."""
        return LinearStats(
            **vars(super().stats()),
            gram=(self.gram / self.tokens).cpu(),
            sample=torch.cat(self.kept),
        )


@dataclass(frozen=True)
class CalibrationSettings:
    """What is calibrated on: see `load_samples`. `batch_size` 0 means what memory allows."""

    dataset: str = "bundled"
    samples: int = 128
    seqlen: int = 2048
    seed: int = 0
    strict: bool = False
    batch_size: int = 0


def calibrate(
    folder: str | Path,
    settings: CalibrationSettings,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    spill_folder: str | Path | None = None,
) -> CalibrationStats:
    """Run the model in `folder` over calibration text, and observe.

    Args:
        device: where it runs.
        dtype: that it is computed in.
        progress: told the text that is used, and each block.
        spill_folder: where hidden states go that memory does not hold; see HiddenStore.

    Raises:
        UserError: the model or the text cannot be used; see BlockModel, load_samples.
    """
    samples = load_samples(
        settings.dataset, Tokenizer.from_folder(folder), settings.samples, settings.seqlen,
        seed=settings.seed, strict=settings.strict,
    )
    progress.note(samples.note)
    model = BlockModel(folder, device, dtype)
    channels = observe(model, samples.ids, progress, settings.batch_size, spill_folder)
    info = CalibrationInfo(
        model=fingerprint(folder),
        num_blocks=model.num_blocks,
        dataset=samples.source,
        note=samples.note,
        samples=settings.samples,
        seqlen=settings.seqlen,
        seed=settings.seed,
        ids=hashlib.sha256(samples.ids.numpy().tobytes()).hexdigest(),
        dtype=str(dtype).removeprefix("torch."),
    )
    return CalibrationStats(channels, info)


def observe(
    model: BlockModel,
    ids: Tensor,
    progress: Progress,
    batch_size: int = 0,
    spill_folder: str | Path | None = None,
) -> dict[str, ChannelStats]:
    """Stats by name (see CalibrationStats) of `model` over ids int64 [samples, seqlen]."""
    hidden, size = embed_samples(model, ids, progress.note, batch_size, spill_folder)
    channels: dict[str, ChannelStats] = {}
    progress.stage("calibrate", model.num_blocks)
    for index in range(model.num_blocks):
        block = model.load_block(index)
        found, size = observe_block(model, block, hidden, size, progress.note)
        for name, observer in found.items():
            channels[f"layers.{index}.{name}"] = _finite(observer, index, name, model.dtype)
        del block  # before the next one is loaded
        progress.step()
    last = Observer()
    in_batches(
        len(hidden), size, lambda batch: last.update(hidden[batch].flatten(0, 1)), progress.note
    )
    channels["norm.input"] = last.stats()
    return channels


def observe_block(
    model: BlockModel,
    block: DecoderLayer,
    hidden: HiddenStore,
    batch_size: int,
    note: Callable[[str], None],
) -> tuple[dict[str, Observer], int]:
    """Run one block over all samples; `hidden` is then what the next block gets.

    Returns:
        (observers by name in the block, batch size that fitted in memory).
    """
    total: dict[str, Observer] = {}
    stride = sample_stride(len(hidden) * hidden[0:1].shape[1])

    def work(batch: slice) -> None:
        # Counted only when the whole batch is through: memory may run out in the middle of it.
        seen: dict[str, Observer] = {}

        def see(name: str, x: Tensor) -> None:
            seen.setdefault(name, Observer()).update(x)

        def see_linear(name: str, x: Tensor) -> None:
            name = f"{name}.input"
            before = total[name].tokens if name in total else 0
            seen[name] = LinearObserver(stride, before)
            seen[name].update(x)

        inputs = hidden[batch]
        see("input_layernorm.input", inputs.to(model.device).flatten(0, 1))
        with observed_inputs(block, see_linear):
            outputs = model.run(block, inputs)
        see("post_attention_layernorm.input", model.attended().flatten(0, 1))
        keys, values = model.kv()
        see("self_attn.key", keys.flatten(0, 1))
        see("self_attn.value", values.flatten(0, 1))
        hidden[batch] = outputs
        for name, observer in seen.items():
            if name in total:
                total[name].merge(observer)
            else:
                total[name] = observer

    size = in_batches(len(hidden), batch_size, work, note)
    return total, size


def embed_samples(
    model: BlockModel,
    ids: Tensor,
    note: Callable[[str], None],
    batch_size: int = 0,
    spill_folder: str | Path | None = None,
) -> tuple[HiddenStore, int]:
    """Hidden states of ids [samples, seqlen] before the first block, and samples to run at a time.

    Raises:
        UserError: samples are longer than the model's context, or hold ids that it does not have.
    """
    samples, seqlen = ids.shape
    config = model.config
    if seqlen > config.max_position_embeddings:
        raise UserError(
            f"Samples of {seqlen} tokens are longer than the model's context of "
            f"{config.max_position_embeddings}.",
            f"Use --calib-seqlen {config.max_position_embeddings} or less.",
            field="calib_seqlen",
        )
    if int(ids.max()) >= config.vocab_size:
        raise UserError(
            f"The tokenizer makes token {int(ids.max())}, but the model has only "
            f"{config.vocab_size}.",
            "tokenizer.json and config.json do not belong together.",
        )
    shape = (samples, seqlen, config.hidden_size)
    total = samples * seqlen * config.hidden_size * model.dtype.itemsize
    device, bound = _room_for(total, model.device)
    store = HiddenStore(shape, model.dtype, device, bound, spill_folder)
    if store.disk_bytes:
        note(f"{store.disk_bytes / 1e9:.1f} GB of hidden states go to disk: memory is too small.")

    def work(batch: slice) -> None:
        store[batch] = model.embed(ids[batch])

    return store, in_batches(samples, batch_size or max(BATCH_TOKENS // seqlen, 1), work, note)


def _room_for(total: int, device: torch.device) -> tuple[torch.device, int]:
    """Where hidden states of `total` bytes are kept, and how many of them at most.

    On the GPU if they take a quarter of what is free there; else on the host, in half of it.
    """
    if device.type == "cuda" and total <= torch.cuda.mem_get_info(device)[0] // 4:
        return device, total
    return torch.device("cpu"), psutil.virtual_memory().available // 2


def _finite(observer: Observer, index: int, name: str, dtype: torch.dtype) -> ChannelStats:
    stats = observer.stats()
    if not is_finite(stats.absmax):
        raise UserError(
            f"In block {index}, {name.removesuffix('.input')} meets values that "
            f"{str(dtype).removeprefix('torch.')} cannot hold.",
            "Use --dtype bfloat16 or float32; if that does not help, the weights are damaged.",
            field="dtype",
        )
    return stats
