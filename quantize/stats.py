"""What calibration found out, and its file: one of safetensors, which names the model it is of.

Of every norm's input, K and V: ranges and means by channel. Of every linear's input also what a
search for scales needs, so that checkpoints can be made of it without running any text again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from backend.errors import UserError
from backend.models.checkpoint import read_checkpoint
from backend.models.model_config import ModelConfig

STATS_FILE = "calibration_stats.safetensors"
FORMAT = "2"  # of the file; raised when an older reader would misread it
SAMPLED_BYTES = 1 << 16  # of each weight file, for a model's fingerprint
# Tokens of each linear's input that are kept as they are. Strengths of smoothing are judged by
# them: on the bundled model 4096 choose the same or their neighbours, in six times the time.
SAMPLED_TOKENS = 512
RUNS = (128, 64, 32, 1)  # channels whose products with one another are kept: what divides all


@dataclass(frozen=True)
class ChannelStats:
    """Of each channel, over all tokens; float32 tensors of one shape: [C], or [K, D] of K and V."""

    min: Tensor
    max: Tensor
    absmax: Tensor
    mean: Tensor
    absmean: Tensor


@dataclass(frozen=True)
class LinearStats(ChannelStats):
    """Of a linear's inputs, [C]; what a search for scales needs is here.

    Attributes:
        gram: float32 [C / run, run, run], mean(x xᵀ) within runs of channels: the blocks on the
            diagonal of what is C x C whole. Weights are rounded in groups that are no longer.
        sample: [n, C], about SAMPLED_TOKENS tokens, in the dtype that was computed in.
    """

    gram: Tensor
    sample: Tensor


def run_length(channels: int) -> int:
    """How many neighbouring channels share a block of a LinearStats' gram."""
    return next(run for run in RUNS if channels % run == 0)


def sample_stride(total: int) -> int:
    """One token of so many is kept of `total`, evenly spread.

    Odd, so that not every sequence gives the same places: most lengths are even.
    """
    return max(1, total // SAMPLED_TOKENS) | 1


def stats_bytes(config: ModelConfig, itemsize: int) -> int:
    """About how large the file of a model's stats is, computed in a dtype of `itemsize` bytes."""
    attention = config.num_heads * config.head_dim
    channels = 2 * config.hidden_size + attention + config.intermediate_size
    return config.num_layers * channels * (4 * RUNS[0] + itemsize * SAMPLED_TOKENS)


@dataclass(frozen=True)
class CalibrationInfo:
    """How stats were made. `note` is for the user; `model` is `fingerprint` of the checkpoint.

    `ids` is a SHA-256 of the windows' tokens.
    """

    model: str
    num_blocks: int
    dataset: str
    note: str
    samples: int
    seqlen: int
    seed: int
    ids: str
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

    def linear(self, block: int, name: str) -> LinearStats:
        """The same of a linear, with what a search needs."""
        stats = self.input(block, name)
        assert isinstance(stats, LinearStats)
        return stats

    def keys(self, block: int) -> ChannelStats:
        """A block's K after the rotation, [K, D]."""
        return self.channels[f"layers.{block}.self_attn.key"]

    def values(self, block: int) -> ChannelStats:
        """A block's V, [K, D]."""
        return self.channels[f"layers.{block}.self_attn.value"]


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
        for field in fields(channel)
    }
    metadata = {"format": FORMAT, "info": json.dumps(asdict(stats.info), ensure_ascii=False)}
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata)
        os.chmod(partial, 0o644)  # safetensors lets nobody but its owner read a file
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be written: {reason}.") from error


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
        stored = set(file.keys())
        channels = {}
        for name in sorted({tensor.rpartition(".")[0] for tensor in stored}):
            kind = LinearStats if f"{name}.gram" in stored else ChannelStats
            channels[name] = kind(
                **{part.name: file.get_tensor(f"{name}.{part.name}") for part in fields(kind)}
            )
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
