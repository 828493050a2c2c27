"""Checkpoints made by what an earlier `lite calibrate` kept: no text is run, only weights are read.

Each block is searched by the inputs that it had in the 16-bit model. A job that calibrates itself
observes them behind the quantized blocks before, and every product of two channels, not only those
of near ones: it takes longer and loses less (docs/quantization.md has both figures).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from backend.models.decoder import DecoderLayer
from quantize import awq, smoothquant
from quantize.auto_awq import check_config
from quantize.awq import SearchSettings
from quantize.blocks import BlockModel, linears
from quantize.export import CheckpointWriter, awq_config, awq_tensors
from quantize.moments import InputMoments
from quantize.progress import Progress
from quantize.smoothquant import QUANTIZATION_CONFIG, InputSample, int8_tensors
from quantize.stats import CalibrationStats, LinearStats

Inputs = dict[str, LinearStats]  # by a linear's name in its block
Finished = tuple[Mapping[str, Tensor], Mapping[str, float]]  # tensors by name, losses by linear


def awq_by_stats(
    source: str,
    target: str,
    stats: CalibrationStats,
    settings: SearchSettings,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    *,
    overwrite: bool = False,
) -> CheckpointWriter:
    """A 4-bit AWQ checkpoint; arguments, result and errors are those of `auto_awq`.

    Args:
        stats: of the model in `source`.
        dtype: that its weights are read in.
    """
    model = BlockModel(source, device, dtype)
    check_config(model.config, source)
    stored: torch.dtype = getattr(torch, model.config.dtype)

    def convert(block: DecoderLayer, inputs: Inputs) -> Finished:
        tokens = stats.info.samples * stats.info.seqlen
        moments = {name: moments_of(found, tokens, device) for name, found in inputs.items()}
        quantized = awq.quantize_block(block, moments, settings, stored, progress.times)
        return awq_tensors(block, quantized), quantized.losses

    job = {
        "method": "awq",
        "settings": asdict(settings),
        **_made_by(stats, device, dtype),
    }
    writer = CheckpointWriter(source, target, awq_config(settings.form), job, overwrite)
    return _convert_blocks(model, writer, stats, convert, progress)


def smooth_quant_by_stats(
    source: str,
    target: str,
    stats: CalibrationStats,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    *,
    overwrite: bool = False,
) -> CheckpointWriter:
    """A checkpoint of 8-bit weights; arguments, result and errors are those of `smooth_quant`.

    Args:
        stats: of the model in `source`.
        dtype: that its weights are read in.
    """
    model = BlockModel(source, device, dtype)
    stored: torch.dtype = getattr(torch, model.config.dtype)

    def convert(block: DecoderLayer, inputs: Inputs) -> Finished:
        samples = {name: InputSample.of_stats(found, device) for name, found in inputs.items()}
        smoothed = smoothquant.quantize_block(block, samples, stored)
        return int8_tensors(block, smoothed), smoothed.losses

    job = {"method": "smooth_quant", **_made_by(stats, device, dtype)}
    writer = CheckpointWriter(source, target, QUANTIZATION_CONFIG, job, overwrite)
    return _convert_blocks(model, writer, stats, convert, progress)


def moments_of(stats: LinearStats, tokens: int, device: torch.device) -> InputMoments:
    """The moments of `tokens` inputs, where products of far channels are taken for 0."""
    moments = InputMoments(len(stats.absmean), device)
    moments.gram.copy_(torch.block_diag(*stats.gram))
    moments.absmean.copy_(stats.absmean)
    moments.tokens = tokens
    return moments


def _convert_blocks(
    model: BlockModel,
    writer: CheckpointWriter,
    stats: CalibrationStats,
    convert: Callable[[DecoderLayer, Inputs], Finished],
    progress: Progress,
) -> CheckpointWriter:
    done = writer.blocks_done()
    if done:
        progress.note(f"Going on after block {done}: an earlier run finished the ones before.")
    progress.stage("quantize", model.num_blocks, done)
    for index in range(done, model.num_blocks):
        block = model.load_block(index)
        inputs = {name: stats.linear(index, name) for name in linears(block)}
        tensors, losses = convert(block, inputs)
        writer.write_block(index, tensors, losses)
        del block, tensors  # before the next one is loaded
        progress.step(loss=sum(losses.values()) / len(losses))
    writer.finish()
    return writer


def _made_by(
    stats: CalibrationStats, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """What a job's result depends on; one that is gone on with must have the same."""
    return {
        "stats": asdict(stats.info),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
    }
