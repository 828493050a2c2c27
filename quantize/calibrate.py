"""What the inputs of a model's layers look like over calibration text, observed block by block.

Memory holds one block, the hidden states of all samples up to a bound (the rest lies on disk), and
a few vectors a layer. The result is one safetensors file that names the model it belongs to.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from backend.errors import UserError
from backend.models.checkpoint import read_checkpoint
from backend.models.decoder import DecoderLayer
from backend.models.loader import is_finite
from backend.tokenizer import Tokenizer
from quantize.blocks import BlockModel, HiddenStore, in_batches, observed_inputs
from quantize.data import load_samples
from quantize.progress import Progress

STATS_FILE = "calibration_stats.safetensors"
FORMAT = "1"  # of the file; raised when an older reader would misread it
BATCH_TOKENS = 8192  # run at a time unless asked otherwise: enough for a GPU's largest products
SAMPLED_BYTES = 1 << 16  # of each weight file, for a model's fingerprint


@dataclass(frozen=True)
class ChannelStats:
    """Of each channel, over all tokens; float32 tensors of one shape: [C], or [K, D] of K and V."""

    min: Tensor
    max: Tensor
    absmax: Tensor
    mean: Tensor
    absmean: Tensor


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


@dataclass(frozen=True)
class CalibrationInfo:
    """How stats were made. `note` is for the user; `model` is `fingerprint` of the checkpoint."""

    model: str
    num_blocks: int
    dataset: str
    note: str
    samples: int
    seqlen: int
    seed: int
    dtype: str  # that the model was computed in


@dataclass(frozen=True)
class CalibrationStats:
    """Stats of every linear's and norm's input, and of K and V, by name.

    What a norm gives out is the input of the linear that reads it: qkv_proj reads input_layernorm,
    gate_up_proj reads post_attention_layernorm.
    """

    channels: dict[str, ChannelStats]
    info: CalibrationInfo

    def input(self, block: int, name: str) -> ChannelStats:
        """Input channels [C] of a block's "self_attn.qkv_proj", "input_layernorm", ..."""
        return self.channels[f"layers.{block}.{name}.input"]

    def keys(self, block: int) -> ChannelStats:
        """A block's K after the rotation, [K, D]."""
        return self.channels[f"layers.{block}.self_attn.key"]

    def values(self, block: int) -> ChannelStats:
        """A block's V, [K, D]."""
        return self.channels[f"layers.{block}.self_attn.value"]


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

    def work(batch: slice) -> None:
        # Counted only when the whole batch is through: memory may run out in the middle of it.
        seen: dict[str, Observer] = {}

        def see(name: str, x: Tensor) -> None:
            seen.setdefault(name, Observer()).update(x)

        inputs = hidden[batch]
        see("input_layernorm.input", inputs.to(model.device).flatten(0, 1))
        with observed_inputs(block, lambda name, x: see(f"{name}.input", x)):
            outputs = model.run(block, inputs)
        see("post_attention_layernorm.input", model.attended().flatten(0, 1))
        keys, values = model.kv()
        see("self_attn.key", keys.flatten(0, 1))
        see("self_attn.value", values.flatten(0, 1))
        hidden[batch] = outputs
        for name, observer in seen.items():
            total.setdefault(name, Observer()).merge(observer)

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


def save_stats(stats: CalibrationStats, path: str | Path, overwrite: bool = False) -> None:
    """Write to `path`: under another name first, so that a file of this name is always whole.

    Raises:
        UserError: the file exists and may not be replaced, or cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(
            f"{path} is there already.", "Give --overwrite to replace it, or another --work-dir."
        )
    tensors = {
        f"{name}.{field.name}": getattr(channel, field.name).contiguous()
        for name, channel in stats.channels.items()
        for field in fields(ChannelStats)
    }
    metadata = {"format": FORMAT, "info": json.dumps(asdict(stats.info), ensure_ascii=False)}
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(save(tensors, metadata))  # save_file lets nobody but its owner read it
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error


def load_stats(path: str | Path, model_folder: str | Path | None = None) -> CalibrationStats:
    """Read what `save_stats` wrote; `path` may be the folder that STATS_FILE lies in.

    Args:
        model_folder: the model that they must be of; None takes any.

    Raises:
        UserError: no such file, damaged, of another version, or of another model.
    """
    path = Path(path)
    path = path / STATS_FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"There are no calibration stats {path}.", "Run lite calibrate first.")
    with _damage_told(path), safe_open(path, framework="pt", device="cpu") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise UserError(
                f"{path} is no file of calibration stats, or of another version of LMDesk.",
                "Run lite calibrate again.",
            )
        info = CalibrationInfo(**json.loads(metadata["info"]))
        names = sorted({name.rpartition(".")[0] for name in file.keys()})
        channels = {
            name: ChannelStats(
                **{part.name: file.get_tensor(f"{name}.{part.name}")
                   for part in fields(ChannelStats)}
            )
            for name in names
        }
    if model_folder is not None and info.model != fingerprint(model_folder):
        raise UserError(
            f"The calibration stats {path} are of another model than {model_folder}.",
            "Run lite calibrate for this model.",
        )
    return CalibrationStats(channels, info)


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"The calibration stats {path} are damaged: {error}.", "Run lite calibrate again."
        ) from error


def fingerprint(folder: str | Path) -> str:
    """Tells checkpoints apart: of config.json, and of each weight file's size and a sample of it.

    Weights of tens of gigabytes are not read for it. Another name or place changes nothing.
    """
    digest = hashlib.sha256((Path(folder) / "config.json").read_bytes())
    paths = {info.path for info in read_checkpoint(str(folder)).values()}
    for path in sorted(paths, key=os.path.basename):
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{os.path.basename(path)} {size}".encode())
            for place in (0, size // 2, size - SAMPLED_BYTES):  # header, middle, end
                file.seek(max(place, 0))
                digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()
