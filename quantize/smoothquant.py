"""SmoothQuant (Xiao et al. 2023): weights and tokens of 8 bits, outlier channels evened out first.

A token is rounded in steps of its largest element / 127, so that one channel of outliers leaves
the others hardly any steps. A scale s per input channel moves between a matrix and what feeds it,
W x = (W s)(x / s): s = max|x|**a / max|w|**(1 - a) leaves the outliers where rounding, by rows of W
and tokens of x, hurts least. LMDeploy fixes a at 0.5; here a is searched per scale group, by the
error of the very product that will be computed, and no smoothing at all is tried as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backend.errors import UserError
from backend.layers.linear import LinearLayer
from backend.layers.methods.smoothquant import SmoothQuantMethod
from backend.layers.norm import RMSNorm
from backend.models.decoder import DecoderLayer, scale_groups
from kernels.packing import W8Weight
from quantize.awq import realisable
from quantize.blocks import BlockModel, linears, observed_inputs, propagate
from quantize.calibrate import embed_samples
from quantize.data import Samples
from quantize.export import CheckpointWriter, stored_parts
from quantize.hidden_store import HiddenStore, in_batches
from quantize.progress import Progress
from quantize.stats import LinearStats, sample_stride

QUANTIZATION_CONFIG = {"quant_method": "smooth_quant", "quant_dtype": "int8"}
STEPS = 20  # of the strength, from 0 to 1
ROWS = 8192  # of a matrix rounded at a time


@dataclass(frozen=True)
class SmoothedBlock:
    """A decoder block's new contents, by module names in it.

    Attributes:
        linears: every linear layer, whole (fused ones too).
        norms: the norms' new weights, in the dtype that is stored.
        biases: the linears' new biases, in the dtype that is stored.
        strengths: each scale group's exponent a; None where no smoothing was best.
        losses: relative error of each linear's product, mean |W' x' - W x|² / mean |W x|².
    """

    linears: dict[str, W8Weight]
    norms: dict[str, Tensor]
    biases: dict[str, Tensor]
    strengths: dict[str, float | None]
    losses: dict[str, float]


class InputSample:
    """The largest magnitude of each of a linear's inputs, and some of its tokens.

    Args:
        in_features: of the linear.
        total: tokens that will be seen; about SAMPLED_TOKENS of them are kept, evenly spread.

    Attributes:
        absmax: float32 [K], of all tokens seen.
    """

    def __init__(self, in_features: int, total: int, device: torch.device) -> None:
        self.absmax = torch.zeros(in_features, device=device)
        self._stride = sample_stride(total)
        self._seen = 0
        self._kept: list[Tensor] = []

    @classmethod
    def of_stats(cls, stats: LinearStats, device: torch.device) -> InputSample:
        """What an earlier calibration kept."""
        sample = cls(len(stats.absmax), len(stats.sample), device)
        sample.absmax = stats.absmax.to(device)
        sample._kept = [stats.sample.to(device, torch.float32)]
        return sample

    def add(self, x: Tensor) -> None:
        """x [T, K] of any float dtype."""
        self.absmax = torch.maximum(self.absmax, x.abs().amax(0).float())
        kept = x[-self._seen % self._stride :: self._stride]
        self._kept.append(kept.to(torch.float32, copy=True))  # a view would keep all of x
        self._seen += x.shape[0]

    @property
    def tokens(self) -> Tensor:
        """Those kept, float32 [n, K]."""
        return torch.cat(self._kept)


def round_rows(weight: Tensor) -> W8Weight:
    """weight float32 [N, K] in 8 bits, a row's largest magnitude being 127."""
    scales = (weight.abs().amax(-1) / 127).clamp(min=1e-12)
    return W8Weight((weight / scales[:, None]).round().to(torch.int8), scales)


def _rounded(x: Tensor) -> Tensor:
    """x [rows, K] as 8 bits a number and a scale a row express it."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
    return (x / scale).round_().mul_(scale)


def product_loss(weight: Tensor, tokens: Tensor, scale: Tensor, exact: Tensor) -> float:
    """Sum of |W' x' - W x|² over tokens [n, K], smoothed by scale [K].

    W is weight [N, K], and exact [n, N] the product as it should be.
    """
    inputs = _rounded(tokens / scale)
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for rows, wanted in zip(weight.split(ROWS), exact.split(ROWS, dim=1)):
        product = inputs @ _rounded(rows * scale).t()
        total += (product - wanted).square_().sum(dtype=torch.float64)
    return float(total)


def search_scale(
    weight: Tensor, sample: InputSample, norm: Tensor | None = None
) -> tuple[Tensor, float | None]:
    """(scale float32 [K] that rounds the product with the least error, its strength).

    Args:
        weight: float32 [N, K], of all linears with these inputs.
        norm: the weights [K] of the norm that will be divided by the scales, in the dtype that is
            stored: only scales that it can express are tried.
    """
    best, strength, least = torch.ones_like(sample.absmax), None, float("inf")
    tokens = sample.tokens
    exact = tokens @ weight.t()
    for tried, candidate in _candidates(weight, sample.absmax):
        scale = candidate if norm is None else realisable(norm, candidate)
        loss = product_loss(weight, tokens, scale, exact)
        if loss < least:
            best, strength, least = scale, tried, loss
    return best, strength


def _candidates(weight: Tensor, absmax: Tensor) -> Iterator[tuple[float | None, Tensor]]:
    yield None, torch.ones_like(absmax)
    inputs = absmax.clamp(min=1e-5)
    largest = weight.abs().amax(0).clamp(min=1e-5)
    for step in range(STEPS + 1):
        strength = step / STEPS
        scale = inputs**strength / largest ** (1 - strength)
        # A common factor changes nothing; around 1, the norm's weights keep their size.
        yield strength, (scale / scale.log().mean().exp()).clamp(1e-3, 1e3)


def quantize_block(
    block: DecoderLayer,
    samples: dict[str, InputSample],
    dtype: torch.dtype,
    smooth: bool = True,
) -> SmoothedBlock:
    """Smooth and round all linears of a decoder block, which is left as it is.

    Args:
        block: with plain weights.
        samples: of each linear's inputs, by its name in the block.
        dtype: in which norms and biases will be stored.
        smooth: without it the weights are rounded as they are (the baseline).
    """
    layers = linears(block)
    names = {module: name for name, module in block.named_modules()}
    weights = {name: _float_weight(layer) for name, layer in layers.items()}
    biases = {
        name: layer.bias.detach().to(torch.float32, copy=True)
        for name, layer in layers.items()
        if layer.bias is not None
    }
    norms = {
        name: module.weight.detach().to(dtype)
        for name, module in block.named_modules()
        if isinstance(module, RMSNorm)
    }
    strengths: dict[str, float | None] = {}
    scales = {name: torch.ones_like(samples[name].absmax) for name in layers}
    for group in scale_groups(block) if smooth else ():
        targets = [names[target] for target in group.targets]
        source = names[group.source]
        norm = norms.get(source)
        together = torch.cat([weights[target] for target in targets])
        scale, strengths[group.name] = search_scale(together, samples[targets[0]], norm)
        if norm is not None:
            norms[source] = (norm.float() / scale).to(dtype)
        else:
            weights[source][group.rows] /= scale[:, None]
            if source in biases:
                biases[source][group.rows] /= scale
        for target in targets:
            weights[target] *= scale
            scales[target] = scale
    losses = {}
    for name, weight in weights.items():
        tokens, original = samples[name].tokens, weight / scales[name]
        exact = tokens @ original.t()
        whole = float(exact.square().sum(dtype=torch.float64))
        loss = product_loss(original, tokens, scales[name], exact)
        losses[name] = loss / whole if whole > 0 else 0.0
    return SmoothedBlock(
        linears={name: round_rows(weight) for name, weight in weights.items()},
        norms=norms,
        biases={name: bias.to(dtype) for name, bias in biases.items()},
        strengths=strengths,
        losses=losses,
    )


def int8_tensors(block: DecoderLayer, smoothed: SmoothedBlock) -> dict[str, Tensor]:
    """A block's tensors by their names in the checkpoint, as LMDeploy stores them."""
    tensors: dict[str, Tensor] = {}
    for name, layer in linears(block).items():
        stored = smoothed.linears[name]
        for prefix, start, length in stored_parts(layer):
            rows = slice(start, start + length)
            tensors[f"{prefix}.weight"] = stored.qweight[rows].clone()
            tensors[f"{prefix}.scale"] = stored.scales[rows, None].clone()
            if name in smoothed.biases:
                tensors[f"{prefix}.bias"] = smoothed.biases[name][rows].clone()
    for name, module in block.named_modules():
        if isinstance(module, RMSNorm):
            tensors[f"{module.name}.weight"] = smoothed.norms[name]
    return tensors


@torch.no_grad()
def fill_int8(block: DecoderLayer, tensors: Mapping[str, Tensor]) -> None:
    """Make a block of plain weights compute with what `int8_tensors` gave, by int8 arithmetic."""
    for layer in linears(block).values():
        parts = [(prefix, slice(at, at + rows)) for prefix, at, rows in stored_parts(layer)]
        assert isinstance(layer.weight, Tensor)
        layer.method = SmoothQuantMethod()
        for name in ("weight", "scale"):
            whole = torch.cat([tensors[f"{prefix}.{name}"] for prefix, _ in parts])
            parameter = nn.Parameter(whole.to(layer.weight.device), requires_grad=False)
            setattr(layer, name, parameter)
        layer.process_weights_after_loading()
        if layer.bias is not None:
            for prefix, rows in parts:
                layer.bias[rows] = tensors[f"{prefix}.bias"]
    for module in block.modules():
        if isinstance(module, RMSNorm):
            module.weight.copy_(tensors[f"{module.name}.weight"])


def _float_weight(layer: LinearLayer) -> Tensor:
    """A copy of a layer's weight in float32, [out_features, in_features]."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().to(torch.float32, copy=True)


def smooth_quant(
    source: str,
    target: str,
    samples: Samples,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    *,
    batch_size: int = 0,
    overwrite: bool = False,
    spill_folder: str | None = None,
) -> CheckpointWriter:
    """Quantize the model in `source`, which is only read; a killed job goes on at its last block.

    Each block is observed with what the quantized blocks before it give, and its own quantized
    outputs go on to the next.

    Args:
        target: the result's folder; it is not there before `publish`.
        samples: what is calibrated on.
        device: where blocks are run and searched.
        dtype: that blocks are run in: the model's own, or float32.
        progress: told each block and its mean relative loss.
        batch_size: samples at a time; 0 takes what is usual, and less where memory ends.
        overwrite: replace what is there.
        spill_folder: where hidden states go that memory does not hold; by default beside `target`.

    Returns:
        The finished checkpoint, which can be judged at `folder`, and then published.

    Raises:
        UserError: source, target or samples cannot be used, or memory does not suffice.
    """
    model = BlockModel(source, device, dtype)
    if model.config.quantization is not None:
        raise UserError(
            f"{source} is quantized already.",
            "Name the float16 or bfloat16 model that it was made of.",
            field="model",
        )
    job = {
        "method": "smooth_quant",
        "samples": list(samples.ids.shape),
        "ids": hashlib.sha256(samples.ids.numpy().tobytes()).hexdigest(),
        "source": samples.source,
        "note": samples.note,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
    }
    writer = CheckpointWriter(source, target, QUANTIZATION_CONFIG, job, overwrite)
    times = progress.times
    with times("embed"):
        hidden, size = embed_samples(
            model, samples.ids, progress.note, batch_size, spill_folder or writer.target.parent
        )
    stored_dtype: torch.dtype = getattr(torch, model.config.dtype)
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
                inputs, size = _sample_inputs(model, block, hidden, size, progress)
            with times("search scale"):
                smoothed = quantize_block(block, inputs, stored_dtype)
                finished = int8_tensors(block, smoothed), smoothed.losses
            del inputs, smoothed
            with times("write"):
                writer.write_block(index, *finished)
        tensors, losses = finished
        with times("propagate"):
            fill_int8(block, tensors)
            if index + 1 < model.num_blocks:
                size = propagate(model, block, hidden, size, progress.note)
        del block, finished, tensors  # before the next one is loaded
        if index >= done:
            progress.step(loss=sum(losses.values()) / len(losses))
    with times("write"):
        writer.finish()
    return writer


def _sample_inputs(
    model: BlockModel, block: DecoderLayer, hidden: HiddenStore, size: int, progress: Progress
) -> tuple[dict[str, InputSample], int]:
    """(what a block's linears read, by their names in it; batch size that fitted in memory)."""
    total = len(hidden) * hidden[0:1].shape[1]
    samples = {
        name: InputSample(layer.in_features, total, model.device)
        for name, layer in linears(block).items()
    }

    def work(batch: slice) -> None:
        # Counted only when the whole batch is through: memory may run out in the middle of it.
        seen: dict[str, Tensor] = {}
        with observed_inputs(block, seen.__setitem__):
            model.run(block, hidden[batch].to(model.device))
        for name, x in seen.items():
            samples[name].add(x)

    size = in_batches(len(hidden), size, work, progress.note)
    for name, sample in samples.items():
        if not bool(torch.isfinite(sample.absmax).all()):
            raise UserError(
                f"The inputs of {name} grow beyond what "
                f"{str(model.dtype).removeprefix('torch.')} holds.",
                "Use --dtype bfloat16 or float32.",
                field="dtype",
            )
    return samples, size
