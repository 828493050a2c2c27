"""From a folder in Hugging Face layout, or a workspace, to a Decoder with weights.

Everything that can be told from config.json and the files' headers is checked before memory is
taken. Then tensors are streamed one by one, each rank reading only its part of them, so that the
peak is the model plus one tensor.
"""

from __future__ import annotations

import logging
import re
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from backend.errors import UserError
from backend.layers.linear import BuildContext
from backend.layers.linear_method import LinearMethod, WeightSlot
from backend.layers.methods.awq import AWQMethod, pack_runs, pack_tiles
from backend.layers.methods.smoothquant import SmoothQuantMethod
from backend.layers.methods.unquantized import UnquantizedMethod
from backend.layers.parallel import ParallelContext
from backend.models.checkpoint import (
    DOWNLOAD_AGAIN,
    TensorInfo,
    read_checkpoint,
    read_tensor,
)
from backend.models.decoder import Decoder
from backend.models.long_context import LongContext
from backend.models.model_config import ModelConfig
from backend.models.registry import family_of, read_model_config
from backend.models.workspace_weights import (
    read_workspace,
    unpack_scales_zeros,
    workspace_slots,
)
from backend.workspace.layout import verify, workspace_of
from kernels.cpu.linear_w4 import supports as cpu_has_w4
from kernels.dispatch import is_reference_only

log = logging.getLogger(__name__)

# Buffers that older versions of transformers saved; they are computed, not loaded.
IGNORED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.masked_bias$")
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
# How quantized weights are stored: as safetensors spells it, and what the numbers are.
WHOLE_NUMBERS = {
    torch.int32: ("I32", "eight 4-bit numbers each"),
    torch.int8: ("I8", "an 8-bit number each"),
}


def load_model(
    folder: str,
    dtype: torch.dtype,
    device: torch.device,
    parallel: ParallelContext,
    session_len: int | None = None,
    *,
    long_context: LongContext | None = None,
    batch_invariant: bool = False,
) -> tuple[Decoder, ModelConfig]:
    """Load this rank's share of the checkpoint in `folder`.

    Args:
        folder: config.json and safetensors files, or a workspace.
        dtype: float32, bfloat16 or float16; weights are converted to it.
        device: where the weights go.
        parallel: this rank and its group.
        session_len: longest sequence that will be run; by default what the model was trained for.
        long_context: what takes the place of what config.json says of texts beyond that.
        batch_invariant: a sequence's bits must not depend on the others in its batch.

    Raises:
        UserError: naming what is missing, damaged, unsupported or inconsistent.
    """
    config, tensors = check_model(folder, parallel, session_len, long_context)
    check_dtype(config, dtype, device)
    workspace = workspace_of(folder)
    if workspace is not None and parallel.rank == 0:
        verify(workspace)
    decoder = _create(config, dtype, device, parallel, session_len, batch_invariant)
    slots = _slots(decoder, parallel, workspace is not None)
    _fill(tensors, slots, show=parallel.rank == 0)
    if workspace is not None:
        unpack_scales_zeros(decoder, parallel.rank, slots)
    del slots
    _process(decoder, device)
    return decoder, config


def check_model(
    folder: str,
    parallel: ParallelContext,
    session_len: int | None = None,
    long_context: LongContext | None = None,
) -> tuple[ModelConfig, dict[str, TensorInfo]]:
    """Whether a rank can load the checkpoint, as far as config.json and the files' headers tell.

    Takes no memory for weights, and needs no other rank.

    Raises:
        UserError: as `load_model`.
    """
    config = read_model_config(folder, long_context)
    workspace = workspace_of(folder)
    if workspace is None:
        tensors = family_of(config.architecture).layout.present(config, read_checkpoint(folder))
    else:
        tensors = read_workspace(workspace, parallel)
    shell = create_shell(config, parallel, session_len)
    check_tensors(config, tensors, _slots(shell, parallel, workspace is not None))
    return config, tensors


def _slots(
    decoder: Decoder, parallel: ParallelContext, from_workspace: bool
) -> dict[str, WeightSlot]:
    """Where the tensors go, by their names in a workspace, or by the decoder's own."""
    return workspace_slots(decoder, parallel.rank) if from_workspace else decoder.weight_slots()


def create_shell(
    config: ModelConfig,
    parallel: ParallelContext,
    session_len: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Decoder:
    """A decoder without memory for weights, which knows its tensors' names and shapes."""
    return _create(config, dtype, torch.device("meta"), parallel, session_len)


def weight_bytes(
    config: ModelConfig, parallel: ParallelContext, dtype: torch.dtype, device: torch.device
) -> int:
    """Bytes that one rank's weights will take, loaded to compute in `dtype` on `device`."""
    shell = create_shell(config, parallel, dtype=dtype)
    packed = config.quantization is not None and config.quantization.method == "awq"
    unpack = packed and not has_w4_kernel(dtype, device)
    total = 0
    for name, parameter in shell.named_parameters():
        if not unpack:
            total += parameter.numel() * parameter.element_size()
        elif name.endswith(".qweight"):  # eight numbers in each
            total += 8 * parameter.numel() * dtype.itemsize
        elif not name.endswith((".scales", ".qzeros")):
            total += parameter.numel() * dtype.itemsize
    if device.type == "cpu" and config.tie_word_embeddings:  # the head keeps a copy
        total += shell.embed_tokens.weight.numel() * dtype.itemsize
    return total


def check_dtype(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Whether the model can be computed in `dtype` on `device`.

    Raises:
        UserError: float32 asked of kernels that compute in 16 bit.
    """
    awq = config.quantization is not None and config.quantization.method == "awq"
    if awq and device.type == "cuda" and dtype == torch.float32:
        raise UserError(
            "A 4-bit model cannot run in float32 on a GPU: its kernels compute in 16 bit.",
            "Load it with --dtype float16 or bfloat16.",
            field="dtype",
        )


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
        elif slot.destination.dtype == torch.int32:  # eight numbers of 4 bits
            slot.destination.random_(-(2**31), 2**31, generator=generator)
        elif slot.destination.dtype == torch.int8:
            slot.destination.random_(-127, 128, generator=generator)
        elif name.endswith(".scale"):  # of such int8 numbers, whose deviation is 73.3
            slot.destination.fill_(0.02 / 73.3)
        else:
            slot.destination.normal_(0.0, 0.02, generator=generator)
            if name.endswith(".scales"):  # the difference of two such numbers is 6.5 on average
                slot.destination.abs_().mul_(0.15)
    _process(decoder, device)
    return decoder


def has_w4_kernel(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `device` multiplies by 4-bit weights as they are."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "meta" or cpu_has_w4(dtype)


def linear_method(
    config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> LinearMethod:
    """How the layers store and multiply their weights on `device`."""
    quantization = config.quantization
    if quantization is None:
        return UnquantizedMethod()
    if quantization.method == "smooth_quant":
        return SmoothQuantMethod(quantization.not_converted)
    has_kernel = is_reference_only() or has_w4_kernel(dtype, device)
    if not has_kernel:
        log.warning(
            "4-bit weights are unpacked to %s and take the memory and the time of such a model's: "
            "only a GPU of compute capability 8.0, and a CPU with --dtype bfloat16, multiply by "
            "4-bit weights.",
            str(dtype).removeprefix("torch."),
        )
    return AWQMethod(
        quantization.group_size,
        quantization.not_converted,
        None if has_kernel else dtype,
        pack_runs if device.type == "cpu" and not is_reference_only() else pack_tiles,
    )


def _create(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    parallel: ParallelContext,
    session_len: int | None,
    batch_invariant: bool = False,
) -> Decoder:
    method = linear_method(config, dtype, device)
    context = BuildContext(dtype, device, parallel, method, batch_invariant)
    family = family_of(config.architecture)
    return family(config, session_len or config.max_position_embeddings, context)


def _process(decoder: Decoder, device: torch.device) -> None:
    """Bring the weights into their kernels' layouts and give back what that needed."""
    decoder.process_weights_after_loading()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check_tensors(
    config: ModelConfig, tensors: dict[str, TensorInfo], slots: dict[str, WeightSlot]
) -> None:
    """Compare the checkpoint's tensors with what the model needs: names, shapes, dtypes.

    Args:
        tensors: by the decoder's names, as `Layout.present` gives them.
        slots: by the same names.

    Raises:
        UserError: naming the first tensor that is missing, unexpected or of another shape.
    """
    missing = sorted(set(slots) - set(tensors))
    if missing:
        stored = family_of(config.architecture).layout.stored_name(missing[0])
        raise UserError(
            f"The checkpoint lacks the tensor {stored}"
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
                f"The checkpoint holds the tensor {info.name:.200}, which a {config.architecture} "
                "with this config.json does not have.",
                "config.json and weights do not belong together, or the model is of another kind.",
            )
        if info.shape != slots[name].shape:
            raise UserError(
                f"{info.name} has the shape {list(info.shape)}, but config.json asks for "
                f"{list(slots[name].shape)}.",
                f"config.json and weights do not belong together. {DOWNLOAD_AGAIN}",
            )
        whole_number = WHOLE_NUMBERS.get(slots[name].destination.dtype)
        if whole_number is not None:
            expected, what = whole_number
            if info.dtype != expected:
                raise UserError(
                    f"{info.name} is stored as {info.dtype:.20}, not as {expected}, {what}.",
                    f"config.json and weights do not belong together. {DOWNLOAD_AGAIN}",
                )
        elif info.dtype not in FLOAT_DTYPES:
            raise UserError(
                f"{info.name} is stored as {info.dtype:.20}, not as floating point.",
                "Use the model's float16 or bfloat16 checkpoint.",
            )


def _fill(tensors: dict[str, TensorInfo], slots: dict[str, WeightSlot], show: bool) -> None:
    """Copy each tensor's part for this rank to its destination, file by file.

    On a terminal, `show` draws a bar of bytes read.
    """
    by_file = defaultdict(list)
    for name in slots:
        by_file[tensors[name].path].append(name)
    drawn = show and sys.stderr is not None and sys.stderr.isatty()
    total = sum(slot.destination.nbytes for slot in slots.values())
    with tqdm(
        total=total, desc="Loading weights", unit="B", unit_scale=True, disable=not drawn
    ) as bar:
        for path, names in by_file.items():
            try:
                _fill_from(path, [(tensors[name], slots[name]) for name in names], bar)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read: {error}.", DOWNLOAD_AGAIN) from error


def _fill_from(path: str, parts: list[tuple[TensorInfo, WeightSlot]], bar: tqdm) -> None:
    """The tensors of one file. Its pages are mapped; a copy to the device is what reads them."""
    device = parts[0][1].destination.device
    with (
        safe_open(path, framework="pt", device="cpu") as file,
        ThreadPoolExecutor(4, initializer=torch.cuda.set_device, initargs=(device,)) as readers,
    ):

        @torch.inference_mode()  # which a thread does not inherit: the model may be made in it
        def read(part: tuple[TensorInfo, WeightSlot]) -> Tensor | None:
            info, slot = part
            slot.destination.copy_(read_tensor(file, info, slot.source))
            return finiteness(slot.destination) if slot.destination.is_floating_point() else None

        flags, checked = [], []
        # One core that faults pages in cannot keep a GPU's link busy. A CPU has no core to spare.
        for part, flag in zip(
            parts, readers.map(read, parts) if device.type == "cuda" else map(read, parts)
        ):
            bar.update(part[1].destination.nbytes)
            if flag is not None:
                flags.append(flag)
                checked.append(part)
        if not flags or bool(torch.stack(flags).all()):  # the one wait for the GPU
            return
        info, slot = next(part for part, flag in zip(checked, flags) if not flag)
        if is_finite(read_tensor(file, info, slot.source)):
            raise UserError(
                f"{info.name} has values that {str(slot.destination.dtype)[len('torch.'):]} "
                "cannot hold.",
                "Load the model with --dtype bfloat16 or float32.",
                field="dtype",
            )
        raise UserError(
            f"{info.name} contains NaN or infinity.", f"The weights are damaged. {DOWNLOAD_AGAIN}"
        )


def finiteness(x: Tensor) -> Tensor:
    """Whether x has neither NaN nor infinity: a boolean on x's device, which nobody waits for.

    One pass, no temporary of x's size.
    """
    if x.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=x.device)
    low, high = torch.aminmax(x)
    return torch.isfinite(low) & torch.isfinite(high)


def is_finite(x: Tensor) -> bool:
    """The same, waited for."""
    return bool(finiteness(x))
