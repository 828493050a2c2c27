"""AWQ (Lin et al. 2023): inputs that matter are made larger before rounding, then ranges are cut.

A scale s per input channel moves between a matrix and what feeds it, W x = (W s)(x / s): a
channel with s > 1 is rounded more finely, the others of its group a little more coarsely. s is
searched per scale group; then each group of weights may lose the ends of its range.

Both searches minimise the error of the product itself, mean |(W' - W) x|² over every calibration
token at once. That needs no tokens while searching, only H = mean(x xᵀ): the error of a row e is
e H eᵀ. (LMDeploy searches batch by batch and averages the exponents; llm-awq keeps some tokens.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from backend.layers.linear import LinearLayer
from backend.layers.norm import RMSNorm
from backend.models.decoder import DecoderLayer, scale_groups
from quantize.blocks import linears
from quantize.gptq import round_compensated
from quantize.moments import ROWS, InputMoments, output_loss
from quantize.rtn import GroupFormat, GroupQuantized, group_parameters, quantize, round_to_groups
from quantize.stages import StageTimes

STEPS = 20  # of the exponent, from 0 to 0.95
SHRINKS = tuple(1 - 0.05 * step for step in range(11))  # to half the range, as llm-awq


@dataclass(frozen=True)
class SearchSettings:
    """What is done beyond rounding to nearest.

    Attributes:
        form: bits, group size, symmetry.
        scale: search each scale group's scales.
        clip: search each group's range.
        compensate: GPTQ's rounding, which lets later columns make up for earlier ones.
    """

    form: GroupFormat = field(default_factory=GroupFormat)
    scale: bool = True
    clip: bool = True
    compensate: bool = True


@dataclass(frozen=True)
class QuantizedBlock:
    """A decoder block's new contents, by module names in it.

    Attributes:
        linears: every linear layer, whole (fused ones too).
        norms: the norms' new weights, in the dtype that is stored.
        biases: the linears' new biases, in the dtype that is stored.
        losses: relative error of each linear's product, mean |(W' - W) x|² / mean |W x|².
    """

    linears: dict[str, GroupQuantized]
    norms: dict[str, Tensor]
    biases: dict[str, Tensor]
    losses: dict[str, float]


def rounding_loss(weight: Tensor, scale: Tensor, gram: Tensor, form: GroupFormat) -> float:
    """Mean |(W' - W) x|² where W' is W rounded with its columns multiplied by scale [K]."""
    total = 0.0
    for rows in weight.split(ROWS):
        rounded = quantize(rows * scale, form).dequantize()
        total += float(output_loss(rounded / scale - rows, gram).double().sum())
    return total


def search_scale(
    weights: Sequence[Tensor], moments: InputMoments, form: GroupFormat, norm: Tensor | None = None
) -> Tensor:
    """The scales float32 [K] that round all these matrices with the least error together.

    Tried: mean |x|**r, and the same over mean |w|**(1 - r), w relative to its group's largest
    (AutoAWQ's rule), r from 0 to 0.95. r = 0 of the first is no scaling at all, so that the
    result is never worse than rounding to nearest.

    Args:
        weights: float32 [N, K] each, all fed by the same inputs.
        norm: the weights [K] of the norm that will be divided by the scales, in the dtype that is
            stored: only scales that it can express are tried.
    """
    best, least = torch.ones_like(moments.absmean), float("inf")
    for candidate in _candidates(weights, moments.absmean, form):
        scale = candidate if norm is None else realisable(norm, candidate)
        loss = sum(rounding_loss(weight, scale, moments.gram, form) for weight in weights)
        if loss < least:
            best, least = scale, loss
    return best


def realisable(norm: Tensor, scale: Tensor) -> Tensor:
    """The scale float32 [K] nearest to `scale` by which norm [K] can be divided without an error.

    A quotient rounded to bfloat16 is up to 0.4 % off; the quotient of norm and what is stored of
    it is exact, and the matrices can be multiplied by that instead.
    """
    kept = (norm.float() / scale).to(norm.dtype)
    exact = norm.float() / kept.float()
    return torch.where(torch.isfinite(exact) & (exact > 0), exact, torch.ones_like(exact))


def _candidates(
    weights: Sequence[Tensor], absmean: Tensor, form: GroupFormat
) -> Iterator[Tensor]:
    yield torch.ones_like(absmean)
    absmean = absmean.clamp(min=1e-8)
    magnitude = torch.zeros_like(absmean)
    for weight in weights:
        for rows in weight.split(ROWS):
            groups = rows.abs().unflatten(1, (-1, form.group_size))
            largest = groups.amax(dim=-1, keepdim=True).clamp(min=1e-8)
            magnitude += (groups / largest).flatten(1).sum(0)
    magnitude /= sum(weight.shape[0] for weight in weights)
    for step in range(STEPS):
        ratio = step / STEPS
        for base in (absmean**ratio, absmean**ratio / (magnitude ** (1 - ratio) + 1e-4)):
            scale = base.clamp(min=1e-4)
            # Around 1, and within what float16 scales leave room for.
            yield (scale / (scale.max() * scale.min()).sqrt()).clamp(1e-3, 1e3)


def search_clip(weight: Tensor, gram: Tensor, form: GroupFormat) -> Tensor:
    """The part of each group's range to keep: float32 [N, K / group].

    Groups are searched by their own inputs' errors; a row whose whole error, with what its groups
    do to one another, would not shrink keeps its ranges.
    """
    return torch.cat([_clip_rows(rows, gram, form) for rows in weight.split(ROWS)])


def _clip_rows(rows: Tensor, gram: Tensor, form: GroupFormat) -> Tensor:
    size = form.group_size
    count = rows.shape[1] // size
    # [groups, size, size]: the part of H within each group
    own = gram.unflatten(0, (count, size)).unflatten(2, (count, size))
    own = own.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
    best = torch.ones(rows.shape[0], count, device=rows.device)
    least = torch.full_like(best, float("inf"))
    for shrink in SHRINKS:
        error = (quantize(rows, form, shrink).dequantize() - rows).unflatten(1, (count, size))
        loss = ((error.transpose(0, 1) @ own).transpose(0, 1) * error).sum(-1)
        better = loss < least
        least = torch.where(better, loss, least)
        best = torch.where(better, torch.full_like(best, shrink), best)
    whole = output_loss(quantize(rows, form).dequantize() - rows, gram)
    clipped = output_loss(quantize(rows, form, best).dequantize() - rows, gram)
    return torch.where((clipped < whole)[:, None], best, torch.ones_like(best))


def quantize_linear(
    weight: Tensor,
    moments: InputMoments,
    settings: SearchSettings,
    times: StageTimes | None = None,
) -> GroupQuantized:
    """weight float32 [N, K] in groups, by the finished moments of its inputs."""
    times = times or StageTimes()
    form, gram = settings.form, moments.gram
    with times("search clip"):
        shrink: Tensor | float = search_clip(weight, gram, form) if settings.clip else 1.0
        scales, zeros = group_parameters(weight, form, shrink)
        nearest = round_to_groups(weight, scales, zeros, form)
    if not settings.compensate:
        return nearest
    with times("gptq"):
        return round_compensated(weight, gram, moments.tokens, nearest, form)


def quantize_block(
    block: DecoderLayer, moments: dict[str, InputMoments], settings: SearchSettings,
    dtype: torch.dtype, times: StageTimes | None = None,
) -> QuantizedBlock:
    """Search and round all linears of a decoder block, which is left as it is.

    Args:
        block: with plain weights, in float32 or `dtype`.
        moments: of each linear's inputs, finished, by its name in the block; they are used up.
        dtype: in which norms and biases will be stored.
        times: told how long each part took.

    Raises:
        UserError: a layer's inputs cannot be cut into groups.
    """
    times = times or StageTimes()
    layers = linears(block)
    names = {module: name for name, module in block.named_modules()}
    weights = {name: _weight(layer) for name, layer in layers.items()}
    biases = {
        name: layer.bias.float().clone()
        for name, layer in layers.items()
        if layer.bias is not None
    }
    norms = {
        name: module.weight.detach().to(dtype)
        for name, module in block.named_modules()
        if isinstance(module, RMSNorm)
    }
    for name, layer in layers.items():
        settings.form.check(name, layer.in_features)
    for group in scale_groups(block) if settings.scale else ():
        targets = [names[target] for target in group.targets]
        source = names[group.source]
        norm = norms.get(source)
        inputs = moments[targets[0]]
        with times("search scale"):
            scale = search_scale([weights[t] for t in targets], inputs, settings.form, norm)
        if norm is not None:
            norms[source] = (norm.float() / scale).to(dtype)
        else:
            weights[source][group.rows] /= scale[:, None]
            if source in biases:
                biases[source][group.rows] /= scale
        for target in targets:
            weights[target] *= scale
            moments[target].divide(scale)
    quantized, losses = {}, {}
    for name, weight in weights.items():
        gram = moments[name].gram
        quantized[name] = quantize_linear(weight, moments[name], settings, times)
        error = output_loss(quantized[name].dequantize() - weight, gram, exact=True)
        whole = float(output_loss(weight, gram).double().sum())
        losses[name] = float(error.double().sum()) / whole if whole > 0 else 0.0
    stored = {name: bias.to(dtype) for name, bias in biases.items()}
    return QuantizedBlock(quantized, norms, stored, losses)


def _weight(layer: LinearLayer) -> Tensor:
    """A copy of a layer's weight in float32, [out_features, in_features]."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().to(torch.float32, copy=True)
