"""From a folder in Hugging Face layout to a Decoder with weights.

Everything that can be told from config.json and the files' headers is checked before memory is
taken. Then tensors are streamed one by one, each rank reading only its part of them, so that the
peak is the model plus one tensor.
"""

from __future__ import annotations

import re
from collections import defaultdict

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from backend.errors import UserError
from backend.layers.linear import BuildContext
from backend.layers.linear_method import WeightSlot
from backend.layers.methods.unquantized import UnquantizedMethod
from backend.layers.parallel import ParallelContext
from backend.models.checkpoint import DOWNLOAD_AGAIN, TensorInfo, read_checkpoint
from backend.models.decoder import Decoder
from backend.models.model_config import ModelConfig
from backend.models.registry import family_of, read_model_config

# Buffers that older versions of transformers saved; they are computed, not loaded.
IGNORED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.masked_bias$")
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


def load_model(
    folder: str,
    dtype: torch.dtype,
    device: torch.device,
    parallel: ParallelContext,
    session_len: int | None = None,
) -> tuple[Decoder, ModelConfig]:
    """Load this rank's share of the checkpoint in `folder`.

    Args:
        folder: config.json and safetensors files.
        dtype: float32, bfloat16 or float16; weights are converted to it.
        device: where the weights go.
        parallel: this rank and its group.
        session_len: longest sequence that will be run; by default what the model was trained for.

    Raises:
        UserError: naming what is missing, damaged, unsupported or inconsistent.
    """
    config, tensors = check_model(folder, parallel, session_len)
    decoder = _create(config, dtype, device, parallel, session_len)
    _fill(tensors, decoder.weight_slots())
    decoder.process_weights_after_loading()
    return decoder, config


def check_model(
    folder: str, parallel: ParallelContext, session_len: int | None = None
) -> tuple[ModelConfig, dict[str, TensorInfo]]:
    """Whether a rank can load the checkpoint, as far as config.json and the files' headers tell.

    Takes no memory for weights, and needs no other rank.

    Raises:
        UserError: as `load_model`.
    """
    config = read_model_config(folder)
    tensors = read_checkpoint(folder)
    shell = _create(config, torch.float32, torch.device("meta"), parallel, session_len)
    check_tensors(config, tensors, shell.weight_slots())
    return config, tensors


def build_model(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    parallel: ParallelContext,
    seed: int,
    session_len: int | None = None,
) -> Decoder:
    """A decoder with random weights (normal, 0.02; norms 1), for benchmarks and tests."""
    decoder = _create(config, dtype, device, parallel, session_len)
    generator = torch.Generator(device).manual_seed(seed)
    for name, slot in decoder.weight_slots().items():
        if name.endswith("norm.weight"):
            slot.destination.fill_(1.0)
        else:
            slot.destination.normal_(0.0, 0.02, generator=generator)
    decoder.process_weights_after_loading()
    return decoder


def _create(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    parallel: ParallelContext,
    session_len: int | None,
) -> Decoder:
    context = BuildContext(dtype, device, parallel, UnquantizedMethod())
    family = family_of(config.architecture)
    return family(config, session_len or config.max_position_embeddings, context)


def check_tensors(
    config: ModelConfig, tensors: dict[str, TensorInfo], slots: dict[str, WeightSlot]
) -> None:
    """Compare the checkpoint's tensors with what the model needs: names, shapes, dtypes.

    Raises:
        UserError: naming the first tensor that is missing, unexpected or of another shape.
    """
    missing = sorted(set(slots) - set(tensors))
    if missing:
        raise UserError(
            f"The checkpoint lacks the tensor {missing[0]}"
            + (f" and {len(missing) - 1} more." if missing[1:] else "."),
            f"Its config.json asks for it. {DOWNLOAD_AGAIN}",
        )
    for name, info in tensors.items():
        if name not in slots:
            # A tied head may have been saved beside the embedding that it equals.
            tied = config.tie_word_embeddings and name == "lm_head.weight"
            if tied or IGNORED.search(name):
                continue
            raise UserError(
                f"The checkpoint holds the tensor {name:.200}, which a {config.architecture} with "
                "this config.json does not have.",
                "config.json and weights do not belong together, or the model is of another kind.",
            )
        if info.shape != slots[name].shape:
            raise UserError(
                f"{name} has the shape {list(info.shape)}, but config.json asks for "
                f"{list(slots[name].shape)}.",
                f"config.json and weights do not belong together. {DOWNLOAD_AGAIN}",
            )
        if info.dtype not in FLOAT_DTYPES:
            raise UserError(
                f"{name} is stored as {info.dtype:.20}, not as floating point.",
                "Use the model's float16 or bfloat16 checkpoint.",
            )


def _fill(tensors: dict[str, TensorInfo], slots: dict[str, WeightSlot]) -> None:
    """Copy each tensor's part for this rank to its destination, file by file."""
    by_file = defaultdict(list)
    for name in slots:
        by_file[tensors[name].path].append(name)
    for path, names in by_file.items():
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in names:
                    slot = slots[name]
                    source = file.get_slice(name)[slot.source]
                    slot.destination.copy_(source)
                    _check_finite(name, slot.destination, source)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}.", DOWNLOAD_AGAIN) from error


def _check_finite(name: str, loaded: Tensor, source: Tensor) -> None:
    if is_finite(loaded):
        return
    if is_finite(source):
        raise UserError(
            f"{name} has values that {str(loaded.dtype).removeprefix('torch.')} cannot hold.",
            "Load the model with --dtype bfloat16 or float32.",
            field="dtype",
        )
    raise UserError(
        f"{name} contains NaN or infinity.", f"The weights are damaged. {DOWNLOAD_AGAIN}"
    )


def is_finite(x: Tensor) -> bool:
    """Whether x has neither NaN nor infinity. One pass, no temporary of x's size."""
    if x.numel() == 0:
        return True
    low, high = torch.aminmax(x)
    return bool(torch.isfinite(low) & torch.isfinite(high))
