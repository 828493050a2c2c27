"""The methods that the quality benchmark compares: the product's own, and rivals by formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backend.layers.norm import RMSNorm
from backend.models.decoder import DecoderLayer, scale_groups
from quantize.auto_awq import auto_awq
from quantize.awq import QuantizedBlock, SearchSettings
from quantize.blocks import BlockModel, linears
from quantize.calibrate import ChannelStats, observe
from quantize.data import Samples
from quantize.export import CheckpointWriter, awq_config, awq_tensors
from quantize.kv_qparams import head_params
from quantize.model_run import KVFormat
from quantize.progress import Progress
from quantize.rtn import GroupFormat, quantize
from quantize.smoothquant import (
    QUANTIZATION_CONFIG,
    SmoothedBlock,
    int8_tensors,
    round_rows,
    smooth_quant,
)

FORM = GroupFormat()  # 4 bits, groups of 128, with zero points: everybody's default
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Job:
    """A model to be quantized by one method after another."""

    source: str
    folder: Path  # of the results
    samples: Samples
    device: torch.device
    dtype: torch.dtype  # that blocks are run in
    progress: Progress

    @cached_property
    def stats(self) -> dict[str, ChannelStats]:
        """What `lite calibrate` sees; names as in CalibrationStats."""
        model = BlockModel(self.source, self.device, self.dtype)
        return observe(model, self.samples.ids, self.progress)


Result = tuple[str, KVFormat]  # a checkpoint, and how its KV cache is kept


@dataclass(frozen=True)
class Method:
    """One row of the table; its documents' losses are compared in pairs with its rivals'."""

    name: str
    make: Callable[[Job, str], Result]
    rivals: tuple[str, ...] = ()


def product_awq(job: Job, target: str, settings: SearchSettings) -> Result:
    """`lite auto_awq`."""
    writer = auto_awq(
        job.source, target, job.samples, settings, job.device, job.dtype, job.progress
    )
    return str(writer.publish()), KVFormat()


def lmdeploy_scale(weights: Sequence[Tensor], absmax: Tensor, form: GroupFormat) -> Tensor:
    """LMDeploy's scales [K] of matrices [N, K] that read inputs of the magnitudes absmax [K].

    s = a**0.5 / w**0.5, w being the mean over rows of |W| relative to its group's largest; then
    divided by sqrt(max(s) * min(s)). Nothing is searched (lite/quantization/awq.py, v0.2.4 to
    v0.16).
    """
    groups = torch.cat(list(weights)).abs().unflatten(1, (-1, form.group_size))
    relative = groups / groups.amax(-1, keepdim=True).clamp(min=1e-5)
    magnitude = relative.flatten(1).mean(0).clamp(min=1e-5)
    scale = (absmax.sqrt() / magnitude.sqrt()).clamp(min=1e-5)
    return scale / (scale.max() * scale.min()).sqrt()


@torch.no_grad()
def lmdeploy_block(job: Job, index: int, block: DecoderLayer, dtype: torch.dtype) -> Tensors:
    """A float32 block by LMDeploy's rule: the inputs' ranges are the 16-bit model's.

    Rounded as this product rounds; v0.2.4's own rounding was coarser.
    """
    names = {module: name for name, module in block.named_modules()}
    for group in scale_groups(block):
        absmax = job.stats[f"layers.{index}.{names[group.targets[0]]}.input"].absmax
        weights = [target.weight for target in group.targets]
        scale = lmdeploy_scale(weights, absmax.to(job.device), FORM)
        if isinstance(group.source, RMSNorm):
            group.source.weight /= scale
        else:
            group.source.weight[group.rows] /= scale[:, None]
            if group.source.bias is not None:
                group.source.bias[group.rows] /= scale
        for weight in weights:
            weight *= scale
    rounded = {name: quantize(layer.weight, FORM) for name, layer in linears(block).items()}
    return awq_tensors(block, QuantizedBlock(rounded, *_others(block, dtype), losses={}))


def naive_int8_block(job: Job, index: int, block: DecoderLayer, dtype: torch.dtype) -> Tensors:
    """W8A8 without smoothing: rows of the weights rounded as they are."""
    rounded = {name: round_rows(layer.weight) for name, layer in linears(block).items()}
    made = SmoothedBlock(rounded, *_others(block, dtype), strengths={}, losses={})
    return int8_tensors(block, made)


def _others(block: DecoderLayer, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    """A block's norms and biases, as they are stored."""
    norms = {
        name: module.weight.to(dtype)
        for name, module in block.named_modules() if isinstance(module, RMSNorm)
    }
    biases = {
        name: layer.bias.to(dtype)
        for name, layer in linears(block).items() if layer.bias is not None
    }
    return norms, biases


def by_formula(
    job: Job,
    target: str,
    make: Callable[[Job, int, DecoderLayer, torch.dtype], Tensors],
    config: dict[str, Any],
) -> Result:
    """A checkpoint made block by block with nothing run in between."""
    model = BlockModel(job.source, job.device, torch.float32)
    writer = CheckpointWriter(job.source, target, config, {"method": make.__name__})
    stored = getattr(torch, model.config.dtype)
    for index in range(model.num_blocks):
        writer.write_block(index, make(job, index, model.load_block(index), stored), {})
    writer.finish()
    return str(writer.publish()), KVFormat()


def product_int8(job: Job, target: str) -> Result:
    """`lite smooth_quant`."""
    writer = smooth_quant(
        job.source, target, job.samples, job.device, job.dtype, job.progress
    )
    return str(writer.publish()), KVFormat()


def online_kv(job: Job, target: str, bits: int) -> Result:
    """The model as it is, scales of its KV cache by token and head."""
    return job.source, KVFormat(bits)


def static_kv(job: Job, target: str) -> Result:
    """`lite kv_qparams`: scales of the KV cache measured beforehand."""
    layers = sum(name.endswith("self_attn.key") for name in job.stats)
    params = torch.stack([
        torch.stack([
            head_params(stats.min, stats.max)
            for stats in (job.stats[f"layers.{i}.self_attn.{kind}"] for kind in ("key", "value"))
        ])
        for i in range(layers)
    ])  # fmt: skip
    return job.source, KVFormat(8, params)


RTN, LMDEPLOY = "W4 round to nearest", "W4 LMDeploy's rule"
NAIVE_INT8, KV8 = "W8A8 not smoothed", "KV int8 by token"
W4 = "W4 "  # what their names begin with
METHODS = (
    Method(RTN, partial(product_awq, settings=SearchSettings(FORM, False, False, False))),
    Method(LMDEPLOY, partial(by_formula, make=lmdeploy_block, config=awq_config(FORM)), (RTN,)),
    Method(
        "W4 auto_awq, no GPTQ",
        partial(product_awq, settings=SearchSettings(FORM, compensate=False)),
        (RTN, LMDEPLOY),
    ),
    Method("W4 auto_awq", partial(product_awq, settings=SearchSettings(FORM)), (RTN, LMDEPLOY)),
    Method(NAIVE_INT8, partial(by_formula, make=naive_int8_block, config=QUANTIZATION_CONFIG)),
    Method("W8A8 smooth_quant", product_int8, (NAIVE_INT8,)),
    Method(KV8, partial(online_kv, bits=8)),
    Method("KV int8 kv_qparams", static_kv, (KV8,)),
    Method("KV int4 by token", partial(online_kv, bits=4)),
)
