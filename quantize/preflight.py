"""Everything that can go wrong in the third hour of a job and be told before its first minute."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from math import prod
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open

from backend.errors import UserError
from backend.layers.linear import LinearLayer
from backend.layers.parallel import ParallelContext
from backend.models.checkpoint import DOWNLOAD_AGAIN, TensorInfo, read_checkpoint, read_tensor
from backend.models.loader import check_model, create_shell, is_finite
from backend.models.model_config import ModelConfig
from backend.models.registry import read_model_config
from backend.workspace.layout import workspace_of
from quantize.progress import Progress
from quantize.verdict import size

GROUP_SIZES = (128, 64, 32)
WORD_OUTPUTS = 8  # 4-bit numbers in an int32 of the checkpoint
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
RESERVE = 1.05  # of the disk space: headers, tokenizer, a file system's own needs


@dataclass(frozen=True)
class Source:
    """A model that can be quantized.

    Attributes:
        linears: names of the weights that are quantized; all others stay as they are.
    """

    folder: str
    config: ModelConfig
    tensors: dict[str, TensorInfo]
    linears: frozenset[str]

    def bytes_of(self, bits: float) -> int:
        """Bytes of the checkpoint with `bits` for each quantized weight, scales included."""
        total = 0.0
        for name, info in self.tensors.items():
            width = bits if name in self.linears else 8 * DTYPE_BYTES.get(info.dtype, 4)
            total += prod(info.shape) * width / 8
        return int(total)


@dataclass(frozen=True)
class Plan:
    """What a job will take, as far as that can be told beforehand. Bytes.

    Attributes:
        target: folder of the result; None if nothing is written.
        dtype: number format computed in.
        memory: of one block at the worst moment, on `device`; 0 where that is not foreseen.
        memory_free: on the device.
        disk: of the result.
        disk_free: where the target will be.
        source: of the model as it is.
    """

    target: str | None
    device: str
    dtype: str
    memory: int
    memory_free: int
    disk: int
    disk_free: int
    source: int

    def describe(self) -> str:
        """For a terminal."""
        lines = [f"device   {self.device}, {self.dtype}; {size(self.memory_free)} of memory free"]
        if self.memory:
            lines.append(f"memory   {size(self.memory)} for one block at a time")
        if self.target is not None:
            lines += [f"disk     {size(self.disk)} of {size(self.source)}; "
                      f"{size(self.disk_free)} free", f"target   {self.target}"]
        return "\n".join(lines)


def check_source(folder: str) -> Source:
    """The model in `folder`, if it can be quantized: its names, shapes and formats are right.

    Raises:
        UserError: no model, not supported, incomplete, damaged, or quantized already.
    """
    if workspace_of(folder) is not None:
        raise UserError(
            f"{folder} is a workspace; a model is quantized before it is converted.",
            "Name the model that it was made of, and convert the result.",
            field="model",
        )
    config = read_model_config(folder)
    packed = any(name.endswith(".qweight") for name in read_checkpoint(folder))
    if config.quantization is not None or packed:
        method = config.quantization.method if config.quantization else "awq"
        raise UserError(
            f"{folder} is quantized already, by {method}.",
            "Name the float16 or bfloat16 model that it was made of.",
            field="model",
        )
    config, tensors = check_model(folder, ParallelContext())
    shell = create_shell(config, ParallelContext())
    linears = {
        name
        for module in shell.modules()
        if isinstance(module, LinearLayer)
        for name in module.weight_slots()
        if name.endswith(".weight")
    }
    return Source(folder, config, tensors, frozenset(linears))


def check_group_size(source: Source, group_size: int) -> None:
    """Whether every linear's inputs are whole groups, and its outputs whole words of 8.

    Raises:
        UserError: naming a weight that they do not divide, and a size that divides all.
    """
    shapes = {name: source.tensors[name].shape for name in sorted(source.linears)}
    for name, (outputs, inputs) in shapes.items():
        if inputs % group_size:
            fits = [g for g in GROUP_SIZES if not any(s[1] % g for s in shapes.values())]
            raise UserError(
                f"{name} has {inputs} inputs, which groups of {group_size} do not divide.",
                f"Use --w-group-size {fits[0]}." if fits else
                f"None of {', '.join(map(str, GROUP_SIZES))} does, so this model stays as it is.",
                field="w_group_size",
            )
        if outputs % WORD_OUTPUTS:
            raise UserError(
                f"{name} has {outputs} outputs; 4-bit weights are stored {WORD_OUTPUTS} by "
                f"{WORD_OUTPUTS}.",
                "This model stays as it is.",
                field="model",
            )


def check_finite(source: Source, progress: Progress) -> None:
    """Read every weight once: a NaN would be found in the last block otherwise, or never.

    Raises:
        UserError: naming the first tensor that holds NaN or infinity, or a file that is damaged.
    """
    by_file = defaultdict(list)
    for name, info in source.tensors.items():
        by_file[info.path].append(name)
    progress.stage("check weights", len(source.tensors))
    for path, names in by_file.items():
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in names:
                    tensor = read_tensor(file, source.tensors[name])
                    if tensor.is_floating_point() and not is_finite(tensor):
                        raise UserError(
                            f"{source.tensors[name].name} in {source.folder} contains NaN or "
                            "infinity.",
                            f"The weights are damaged. {DOWNLOAD_AGAIN}",
                            field="model",
                        )
                    progress.step()
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}.", DOWNLOAD_AGAIN) from error


def check_target(target: str, source: str, overwrite: bool) -> None:
    """Whether a result can be written to the folder `target`, which must not be there yet.

    Raises:
        UserError: it exists and not `overwrite`; it is, holds or lies in the model's own folder;
            or nothing can be written there.
    """
    own, there = Path(source).resolve(), Path(target).resolve()
    if there == own or own in there.parents or there in own.parents:
        raise UserError(
            f"The result cannot go to {target}: the model itself is there, and is never touched.",
            "Choose another --work-dir.",
            field="work_dir",
        )
    if os.path.lexists(target) and not os.path.isdir(target):
        raise UserError(
            f"{target} is a file, not a folder.", "Choose another --work-dir.", field="work_dir"
        )
    if os.path.isdir(target) and os.listdir(target) and not overwrite:
        raise UserError(
            f"The folder {target} exists already.",
            "Choose another --work-dir, or give --overwrite to replace it when the new result is "
            "complete.",
            field="work_dir",
        )
    place = nearest_folder(target)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(
            f"Nothing can be written to {place}: {error.strerror}.",
            "Choose another --work-dir.",
            field="work_dir",
        ) from error


def check_space(target: str, needed: int) -> None:
    """Whether `needed` bytes fit on the disk that `target` will be on.

    Raises:
        UserError: saying how much is missing.
    """
    place = nearest_folder(target)
    free = disk_free(target)
    if free < needed * RESERVE:
        raise UserError(
            f"The result needs about {size(int(needed * RESERVE))} of disk space, and {place} has "
            f"{size(free)} left.",
            "Make room, or choose a --work-dir on another disk.",
            field="work_dir",
        )


def disk_free(target: str) -> int:
    """Bytes free on the disk that `target` is, or will be, on."""
    return shutil.disk_usage(nearest_folder(target)).free


def memory_needed(config: ModelConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes at the worst moment, `tokens` of activations at a time.

    The block as it runs in `dtype`; then either the second moments of all its inputs, each with the
    product that is being added, and the activations, or the moments, the block in float32 and what
    GPTQ makes of its widest matrix. What waits between the blocks is bounded elsewhere.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    attention = config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    matrices = (  # outputs, inputs
        (attention + 2 * kv, hidden), (hidden, attention), (2 * inner, hidden), (hidden, inner),
    )  # fmt: skip
    block = sum(outputs * inputs for outputs, inputs in matrices)
    moments = 4 * sum(inputs**2 for _, inputs in matrices)
    activations = 4 * tokens * (4 * hidden + attention + 2 * kv + 3 * inner)
    rounding = max(16 * inputs**2 + 14 * outputs * inputs for outputs, inputs in matrices)
    observing = 2 * moments + activations
    return dtype.itemsize * block + max(observing, moments + 4 * block + rounding)


def check_memory(device: torch.device, needed: int) -> None:
    """Whether `needed` bytes are free on `device`.

    Raises:
        UserError: saying how much there is.
    """
    free = memory_free(device)
    if free < needed:
        what = "the GPU" if device.type == "cuda" else "this machine"
        raise UserError(
            f"One block of this model needs about {size(needed)} of memory, and {what} has "
            f"{size(free)} free.",
            "Use a smaller --batch-size or --calib-seqlen, or end other programs.",
            field="batch_size",
        )


def memory_free(device: torch.device) -> int:
    """Bytes free on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def nearest_folder(path: str) -> Path:
    """The folder that `path` is or will be made in: its nearest parent that exists."""
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place
