"""Writes a checkpoint one decoder block at a time, so that a killed job goes on where it was.

All is written to NAME.partial beside the target NAME: first `quantization_job.json`, which says
what job this is, then a shard a block, each under another name until it is whole. Index and
config.json come last: before them nobody takes the folder for a model. Then it gets its name.

A block of AWQ's checkpoints is stored as AutoAWQ does, version "gemm"
(https://github.com/casper-hansen/AutoAWQ): see backend.layers.methods.awq and kernels.packing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from backend.errors import UserError
from backend.layers.linear import ColumnParallelLinear, LinearLayer, RowParallelLinear
from backend.layers.norm import RMSNorm
from backend.layers.parallel import ParallelContext
from backend.models.checkpoint import (
    DOWNLOAD_AGAIN,
    read_checkpoint,
    read_header,
    read_tensor,
)
from backend.models.decoder import DecoderLayer
from backend.models.loader import create_shell
from backend.models.registry import family_of, read_config_fields, read_model_config
from kernels.packing import pack_awq, unpack_awq
from quantize.awq import QuantizedBlock
from quantize.blocks import linears
from quantize.preflight import check_target
from quantize.rtn import GroupFormat, GroupQuantized
from quantize.stats import fingerprint

JOB = "quantization_job.json"
REPLACED = ".replaced"  # in the partial folder: the one that it takes the place of
COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "*.tiktoken", "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*",
)  # beside the weights; nothing that could run (.py), no card that describes another model


class CheckpointWriter:
    """The folder that a quantized checkpoint grows in.

    Args:
        source: the model's folder, which is only read.
        target: what the finished checkpoint will be called.
        quantization: config.json's `quantization_config`.
        job: settings and data that the result depends on; a partial result is gone on with only
            if all are the same. The source's own state is added.
        overwrite: replace `target` if it exists, and a partial result of another job.

    Attributes:
        folder: NAME.partial.
        losses: what each finished block's linears lost, by block and by name in it.

    Raises:
        UserError: `target` exists or cannot be written, or NAME.partial is of another job.
    """

    def __init__(
        self,
        source: str,
        target: str,
        quantization: Mapping[str, Any],
        job: Mapping[str, Any],
        overwrite: bool = False,
    ) -> None:
        check_target(target, source, overwrite)
        self.source = Path(source)
        self.target = Path(os.path.abspath(target))
        self.folder = self.target.with_name(self.target.name + ".partial")
        self.quantization = dict(quantization)
        self.config = read_model_config(source)
        self.layout = family_of(self.config.architecture).layout  # the source's, kept
        self.shards = self.config.num_layers + 1
        self.overwrite = overwrite
        self.job = {**job, "model": fingerprint(source)}
        self.losses: dict[str, dict[str, float]] = {}  # of the blocks that are finished
        self._open()

    def _open(self) -> None:
        try:
            if self._is_own():
                if self._continues():
                    return
                if not self.overwrite:
                    raise UserError(
                        f"{self.folder} is what another job with other settings left unfinished.",
                        "Run that job again to finish it, choose another --work-dir, or give "
                        "--overwrite to begin anew.",
                        field="work_dir",
                    )
                self._empty()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_job()
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def _is_own(self) -> bool:
        """Whether the partial folder holds a job. Anybody else's folder of that name is refused."""
        if not os.path.lexists(self.folder):
            return False
        if (self.folder / JOB).is_file():
            return True
        # A job that was killed at once leaves nothing, or the half of its first file.
        if self.folder.is_dir() and all(n.endswith(".tmp") for n in os.listdir(self.folder)):
            return False
        raise UserError(
            f"{self.folder}, where the result would be written, exists and is no unfinished job.",
            "Move it away, or choose another --work-dir.",
            field="work_dir",
        )

    def _continues(self) -> bool:
        """Whether the partial result is of this very job; if so, what it says is taken over."""
        try:
            written = json.loads((self.folder / JOB).read_text(encoding="utf-8"))
            losses = written.pop("losses")
        except (ValueError, KeyError, AttributeError):
            return False
        if written != self.job:
            return False
        self.losses = losses
        return True

    def _write_job(self) -> None:
        _write_json(self.folder / JOB, {**self.job, "losses": self.losses})

    def _empty(self) -> None:
        """Remove what an earlier job wrote, the file that says whose it is last."""
        replaced = self.folder / REPLACED
        if replaced.is_dir() and not self.target.exists():  # it was killed between two renames
            os.rename(replaced, self.target)
        for name in sorted(os.listdir(self.folder), key=lambda name: name == JOB):
            path = self.folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _shard(self, number: int) -> Path:
        return self.folder / f"model-{number:05d}-of-{self.shards:05d}.safetensors"

    def blocks_done(self) -> int:
        """How many blocks, from the first on, are finished."""
        return next(
            index for index in range(self.shards)
            if index == self.config.num_layers or not self._shard(index + 2).exists()
        )

    def finished(self, index: int) -> tuple[dict[str, Tensor], dict[str, float]] | None:
        """(tensors, losses) of a block that an earlier run wrote; None if it did not."""
        path = self._shard(index + 2)
        if not path.exists():
            return None
        try:
            infos = self.layout.present(self.config, read_header(str(path)))
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors = {name: read_tensor(file, info) for name, info in infos.items()}
            return tensors, self.losses[str(index)]
        except (OSError, SafetensorError, KeyError, UserError) as error:
            raise UserError(
                f"{path} cannot be read: {error}.",
                "Give --overwrite to begin anew.",
                field="work_dir",
            ) from error

    def write_block(
        self, index: int, tensors: Mapping[str, Tensor], losses: Mapping[str, float]
    ) -> None:
        """One finished block: its tensors by the decoder's names, and what it lost."""
        self.losses[str(index)] = dict(losses)
        try:
            self._write_job()  # first: a shard that is there is finished in every respect
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        self._write_shard(index + 2, tensors)

    def _write_shard(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        path = self._shard(number)
        draft = path.with_suffix(".tmp")
        stored = self.layout.restore(self.config, tensors)
        ready = {name: tensor.cpu().contiguous() for name, tensor in stored.items()}
        try:
            # More metadata than one entry would be written in a random order.
            save_file(ready, draft, metadata={"format": "pt"})
            os.chmod(draft, 0o644)  # safetensors lets nobody but its owner read a file
            _replace(draft, path)
        except (OSError, SafetensorError) as error:
            raise _unwritable(path, error) from error

    def finish(self) -> Path:
        """Write all that is not a block's: a whole checkpoint, in the partial folder still."""
        if not self._shard(1).exists():
            self._write_shard(1, dict(self._others()))
        try:
            self._write_index()
            for name in sorted(os.listdir(self.source)):
                path = self.source / name
                if path.is_file() and any(fnmatch(name, pattern) for pattern in COPIED):
                    draft = self.folder / (name + ".tmp")
                    shutil.copyfile(path, draft)
                    _replace(draft, self.folder / name)
            config = dict(read_config_fields(str(self.source)).raw)
            if "torch_dtype" not in config and "dtype" not in config:
                config["torch_dtype"] = self.config.dtype
            config["quantization_config"] = self.quantization
            _write_json(self.folder / "config.json", config)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        return self.folder

    def _others(self) -> Iterator[tuple[str, Tensor]]:
        """Embedding, last norm and head as the source stores them."""
        tensors = self.layout.present(self.config, read_checkpoint(str(self.source)))
        for name in create_shell(self.config, ParallelContext()).weight_slots():
            if name.startswith("model.layers."):
                continue
            try:
                with safe_open(tensors[name].path, framework="pt", device="cpu") as file:
                    yield name, read_tensor(file, tensors[name])
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{tensors[name].path} cannot be read: {error}.", DOWNLOAD_AGAIN
                ) from error

    def _write_index(self) -> None:
        weight_map: dict[str, str] = {}
        size = 0
        for number in range(1, self.shards + 1):
            path = self._shard(number)
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():
                    weight_map[name] = path.name
                    size += file.get_tensor(name).nbytes
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(self.folder / "model.safetensors.index.json", index)

    def publish(self, name: str | None = None) -> Path:
        """Give the finished checkpoint its name; only now is a folder in its place replaced.

        Args:
            name: another name beside the target, for a result that is not good.

        Raises:
            UserError: a folder of that name has come up meanwhile, or it cannot be renamed.
        """
        target = self.target if name is None else self.target.with_name(name)
        replaced = self.folder / REPLACED
        check_target(str(target), str(self.source), self.overwrite)  # hours have passed
        try:
            if os.path.lexists(target):
                if replaced.exists():
                    shutil.rmtree(replaced)
                os.rename(target, replaced)
            os.rename(self.folder, target)
            _sync(target.parent)
            shutil.rmtree(target / REPLACED, ignore_errors=True)
        except OSError as error:
            raise _unwritable(target, error) from error
        return target


def awq_config(form: GroupFormat) -> dict[str, Any]:
    """`quantization_config` of an AutoAWQ checkpoint.

    Symmetric weights are stored with their zero point too (it is 8 everywhere), because not every
    reader takes a checkpoint without.
    """
    return {
        "quant_method": "awq",
        "bits": form.bits,
        "group_size": form.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }


def awq_tensors(block: DecoderLayer, quantized: QuantizedBlock) -> dict[str, Tensor]:
    """A block's tensors by the decoder's names, as AutoAWQ stores them."""
    tensors: dict[str, Tensor] = {}
    for name, layer in linears(block).items():
        for prefix, start, length in stored_parts(layer):
            part = quantized.linears[name].rows(start, length)
            tensors[f"{prefix}.qweight"] = pack_awq(part.q.t().contiguous())
            tensors[f"{prefix}.qzeros"] = pack_awq(part.zeros.t().contiguous())
            tensors[f"{prefix}.scales"] = part.scales.t().contiguous()
            if name in quantized.biases:
                tensors[f"{prefix}.bias"] = quantized.biases[name].narrow(0, start, length).clone()
    for name, module in block.named_modules():
        if isinstance(module, RMSNorm):
            tensors[f"{module.name}.weight"] = quantized.norms[name]
    return tensors


@torch.no_grad()
def fill_awq(block: DecoderLayer, tensors: Mapping[str, Tensor]) -> None:
    """Put what `awq_tensors` gave into a block of plain weights, dequantized."""
    for layer in linears(block).values():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        for prefix, start, length in stored_parts(layer):
            q, zeros = (
                unpack_awq(tensors[f"{prefix}.{kind}"].to(weight.device)).t()
                for kind in ("qweight", "qzeros")
            )
            scales = tensors[f"{prefix}.scales"].to(weight.device).t()
            weight[start : start + length] = GroupQuantized(q, scales, zeros).dequantize()
            if layer.bias is not None:
                layer.bias[start : start + length] = tensors[f"{prefix}.bias"]
    for module in block.modules():
        if isinstance(module, RMSNorm):
            module.weight.copy_(tensors[f"{module.name}.weight"])


def stored_parts(layer: LinearLayer) -> list[tuple[str, int, int]]:
    """(name in the checkpoint, first row, rows) of each tensor that a linear's rows come from."""
    if isinstance(layer, RowParallelLinear):
        return [(layer.name, 0, layer.out_features)]
    assert isinstance(layer, ColumnParallelLinear)
    parts, start = [], 0
    for part in layer.parts:
        parts.append((part.name, start, part.length))
        start += part.length
    return parts


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _replace(draft, path)


def _replace(draft: Path, path: Path) -> None:
    """Rename a file that is on the disk, not only on its way there."""
    _sync(draft)
    os.replace(draft, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: Path, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UserError(
        f"{path} cannot be written: {reason}.",
        "Make room or choose another --work-dir; what is finished is kept, and the same command "
        "goes on there.",
        field="work_dir",
    )
