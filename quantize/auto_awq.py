"""The job that makes a 4-bit AWQ checkpoint, block by block.

Each block is run twice over all samples: once to observe its inputs, which come from the blocks
before it as they were quantized, and once quantized, for the inputs of the next. Finished blocks
are on the disk; a job that was killed runs them again as they lie there, and goes on.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict

import torch
from torch import Tensor

from backend.errors import UserError
from backend.models.decoder import DecoderLayer
from backend.models.model_config import ModelConfig
from quantize.awq import SearchSettings, quantize_block
from quantize.blocks import BlockModel, linears, observed_inputs, propagate
from quantize.calibrate import embed_samples
from quantize.data import Samples
from quantize.export import CheckpointWriter, awq_config, awq_tensors, fill_awq
from quantize.hidden_store import HiddenStore, in_batches
from quantize.moments import InputMoments
from quantize.progress import Progress
from quantize.stages import StageTimes

WORD_OUTPUTS = 8  # 4-bit numbers in an int32 of the checkpoint


def auto_awq(
    source: str,
    target: str,
    samples: Samples,
    settings: SearchSettings,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    *,
    batch_size: int = 0,
    overwrite: bool = False,
    spill_folder: str | None = None,
) -> CheckpointWriter:
    """Quantize the model in `source`, which is only read.

    Args:
        target: the result's folder; it is not there before `publish`.
        samples: what is calibrated on.
        settings: what is searched; 4 bits.
        device: where blocks are run and searched.
        dtype: that blocks are run in: the model's own, or float32.
        progress: told each block and its mean relative loss.
        batch_size: samples at a time; 0 takes what is usual, and less where memory ends.
        overwrite: replace what is there.
        spill_folder: where hidden states go that memory does not hold; by default beside `target`.

    Returns:
        The finished checkpoint, which can be judged at `folder`, and then published.

    Raises:
        UserError: source, target, samples or settings cannot be used, or memory does not suffice.
    """
    form = settings.form
    if form.bits != 4:
        raise UserError(
            f"Checkpoints of {form.bits}-bit weights cannot be written.", "Use 4.", field="w_bits"
        )
    model = BlockModel(source, device, dtype)
    check_config(model.config, source)
    job = {
        "method": "awq",
        "settings": asdict(settings),
        "samples": list(samples.ids.shape),
        "ids": hashlib.sha256(samples.ids.numpy().tobytes()).hexdigest(),
        "source": samples.source,
        "note": samples.note,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
    }
    first = model.load_block(0)
    for layer_name, layer in linears(first).items():
        form.check(layer_name, layer.in_features)
    del first
    writer = CheckpointWriter(source, target, awq_config(form), job, overwrite)
    times = progress.times
    with times("embed"):
        hidden, size = embed_samples(
            model, samples.ids, progress.note, batch_size, spill_folder or writer.target.parent
        )
    done = writer.blocks_done()
    if done:
        progress.note(f"Going on after block {done}: an earlier run finished the ones before.")
    progress.stage("quantize", model.num_blocks, done)
    for index in range(model.num_blocks):
        with times("load"):
            block = model.load_block(index)
            finished = writer.finished(index)
        if finished is None:
            with times("observe"):
                moments, size = observe_moments(model, block, hidden, size, progress)
            finished = _quantize(model, block, moments, settings, times)
            del moments
            with times("write"):
                writer.write_block(index, *finished)
        tensors, losses = finished
        with times("propagate"):
            fill_awq(block, tensors)
            if index + 1 < model.num_blocks:
                size = propagate(model, block, hidden, size, progress.note)
        del block, finished, tensors  # before the next one is loaded
        if index >= done:
            progress.step(loss=sum(losses.values()) / len(losses))
    with times("write"):
        writer.finish()
    return writer


def check_config(config: ModelConfig, source: str) -> None:
    """Whether the model can be stored as 4-bit weights.

    Raises:
        UserError: it is quantized already, or has a number of outputs that cannot be packed.
    """
    if config.quantization is not None:
        raise UserError(
            f"{source} is quantized already.",
            "Name the float16 or bfloat16 model that it was made of.",
            field="model",
        )
    for name, outputs in (
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("num_attention_heads * head_dim", config.num_heads * config.head_dim),
        ("num_key_value_heads * head_dim", config.num_kv_heads * config.head_dim),
    ):
        if outputs % WORD_OUTPUTS:
            raise UserError(
                f"{source} has {name} {outputs}; 4-bit weights are stored {WORD_OUTPUTS} by "
                f"{WORD_OUTPUTS}.",
                "This model cannot be quantized.",
                field="model",
            )


def observe_moments(
    model: BlockModel, block: DecoderLayer, hidden: HiddenStore, size: int, progress: Progress
) -> tuple[dict[str, InputMoments], int]:
    """Moments of the inputs of a block's linears over all samples; `hidden` stays as it is.

    Returns:
        (moments by the linear's name in the block, samples that fitted in memory at a time).

    Raises:
        UserError: inputs that are not finite.
    """
    moments = {
        name: InputMoments(layer.in_features, model.device)
        for name, layer in linears(block).items()
    }

    def work(batch: slice) -> None:
        inputs: dict[str, Tensor] = {}
        with observed_inputs(block, inputs.__setitem__):
            model.run(block, hidden[batch].to(model.device))
        # Counted when all are there: memory may run out in the middle of a batch. To count takes
        # no more.
        for name, x in inputs.items():
            moments[name].add(x)

    size = in_batches(len(hidden), size, work, progress.note)
    for name, moment in moments.items():
        moment.finish()
        if not bool(torch.isfinite(moment.gram).all()):
            raise UserError(
                f"The inputs of {name} grow beyond what "
                f"{str(model.dtype).removeprefix('torch.')} holds.",
                "Use --dtype bfloat16 or float32.",
                field="dtype",
            )
    return moments, size


def _quantize(
    model: BlockModel,
    block: DecoderLayer,
    moments: dict[str, InputMoments],
    settings: SearchSettings,
    times: StageTimes,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(a block's tensors for the checkpoint, each linear's relative loss)."""
    try:
        dtype = getattr(torch, model.config.dtype)
        quantized = quantize_block(block, moments, settings, dtype, times)
    except torch.OutOfMemoryError:
        raise UserError(
            "The GPU's memory does not hold one block of this model and what its search needs.",
            "Free the GPU's memory, or use --device cpu.",
            field="device",
        ) from None
    return awq_tensors(block, quantized), quantized.losses
