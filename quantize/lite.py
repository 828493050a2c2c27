"""What the `lite` commands do: check, work, judge, and only then give the result its name."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import wraps

import torch

from backend.errors import UserError
from backend.layers.linear import kv_heads_per_rank
from backend.layers.parallel import ParallelContext
from backend.models.kv_params import read_kv_params, stored_params
from backend.models.loader import check_model
from backend.models.registry import read_model_config
from backend.models.workspace_kv import is_apart
from backend.tokenizer import Tokenizer
from backend.workspace.layout import tensor_para_size
from quantize import preflight
from quantize.auto_awq import auto_awq as quantize_awq
from quantize.awq import SearchSettings
from quantize.by_stats import awq_by_stats, smooth_quant_by_stats
from quantize.calibrate import CalibrationSettings, calibrate as observe_model
from quantize.data import DATASETS, Samples, load_samples
from quantize.evaluate import (
    disk_bytes,
    evaluate as evaluate_model,
    pick_device,
    pick_dtype,
)
from quantize.export import CheckpointWriter
from quantize.flags import (
    calibration_settings,
    earlier_stats,
    evaluation_settings,
    target_folder,
)
from quantize.kv_qparams import head_params, write_kv_qparams
from quantize.model_run import KVFormat
from quantize.preflight import Plan, Source
from quantize.progress import Progress, duration
from quantize.rtn import GroupFormat
from quantize.smoothquant import smooth_quant as quantize_int8
from quantize.stages import peak_memory
from quantize.stats import (
    STATS_FILE,
    CalibrationStats,
    load_stats,
    save_stats,
    stats_bytes,
)

Command = Callable[[argparse.Namespace, Progress], int]


def command(run: Command) -> Callable[[argparse.Namespace], int]:
    """A command of the command line: an error that ends it is an event of its progress, too."""

    @wraps(run)
    def told(args: argparse.Namespace) -> int:
        progress = Progress(args.progress)
        try:
            return run(args, progress)
        except torch.OutOfMemoryError as error:
            told_so = UserError(
                "The GPU's memory is not enough, even for one window of text at a time.",
                "Use a smaller --calib-seqlen or --eval-seqlen, or end what else runs there.",
            )
            progress.error(told_so)
            raise told_so from error
        except UserError as error:
            progress.error(error)
            raise

    return told


@command
def calibrate(args: argparse.Namespace, progress: Progress) -> int:
    """Stats of the model's inputs, keys and values, into the work folder."""
    folder = target_folder(args, "stats")
    path = os.path.join(folder, STATS_FILE)
    if os.path.exists(path) and not args.overwrite:
        raise UserError(
            f"{path} is there already.", "Give --overwrite to replace it, or another --work-dir."
        )
    source = preflight.check_source(args.model)
    # Other files in that folder are left alone.
    preflight.check_target(folder, args.model, overwrite=True)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device, args.model)
    settings = calibration_settings(args)
    preflight.check_space(folder, stats_bytes(source.config, dtype.itemsize))
    needed = preflight.memory_needed(source.config, _tokens_at_once(settings), dtype)
    preflight.check_memory(device, needed)
    preflight.check_finite(source, progress)
    # Beside the result: the system's folder for temporary files may be memory itself.
    beside = os.path.dirname(os.path.abspath(folder))
    stats = observe_model(args.model, settings, device, dtype, progress, beside)
    save_stats(stats, path, args.overwrite)
    progress.result(
        {"path": path, "note": stats.info.note, "seconds": progress.elapsed()},
        f"{path}: {settings.samples} windows of {settings.seqlen} tokens in "
        f"{duration(progress.elapsed())}. {stats.info.note}",
    )
    return 0


@command
def auto_awq(args: argparse.Namespace, progress: Progress) -> int:
    """A 4-bit AWQ checkpoint; exit code 1 if its verdict is that it failed."""
    target = target_folder(args, "awq")
    source = preflight.check_source(args.model)
    preflight.check_group_size(source, args.w_group_size)
    # Each group has a scale of 16 bits and a zero of 4.
    bits = args.w_bits + (16 + 4) / args.w_group_size
    if args.plan:
        return tell_plan(args, source, target, bits, progress)
    device, dtype, given = _prepare(args, source, target, bits, progress)
    settings = SearchSettings(
        GroupFormat(args.w_bits, args.w_group_size, args.w_sym),
        scale=args.search_scale,
        clip=args.search_clip,
        compensate=args.gptq,
    )
    if isinstance(given, CalibrationStats):
        writer = awq_by_stats(
            args.model, target, given, settings, device, dtype, progress, overwrite=args.overwrite
        )
    else:
        writer = quantize_awq(
            args.model,
            target,
            given,
            settings,
            device,
            dtype,
            progress,
            batch_size=calibration_settings(args).batch_size,
            overwrite=args.overwrite,
        )
    return judge_and_publish(writer, args, progress)


@command
def smooth_quant(args: argparse.Namespace, progress: Progress) -> int:
    """A checkpoint with 8-bit weights; exit code 1 if its verdict is that it failed."""
    target = target_folder(args, "w8a8")
    source = preflight.check_source(args.model)
    if args.plan:
        return tell_plan(args, source, target, 8, progress)
    device, dtype, given = _prepare(args, source, target, 8, progress)
    if isinstance(given, CalibrationStats):
        writer = smooth_quant_by_stats(
            args.model, target, given, device, dtype, progress, overwrite=args.overwrite
        )
    else:
        writer = quantize_int8(
            args.model,
            target,
            given,
            device,
            dtype,
            progress,
            batch_size=calibration_settings(args).batch_size,
            overwrite=args.overwrite,
        )
    return judge_and_publish(writer, args, progress)


def judge_and_publish(
    writer: CheckpointWriter, args: argparse.Namespace, progress: Progress
) -> int:
    """Measure a finished checkpoint, then give it its name: NAME, or NAME.failed."""
    seconds = progress.elapsed()
    # Not --dtype: what a job may compute in, a 4-bit model may not (float32 on a GPU).
    settings = replace(evaluation_settings(args), dtype="auto")
    with progress.times("verdict"):
        verdict = evaluate_model(str(writer.folder), args.model, settings, progress)
    name = writer.target.name if verdict.passed else free_name(f"{writer.target}.failed")
    folder = str(writer.target.with_name(name))
    verdict = replace(
        verdict,
        model=replace(verdict.model, model=folder),
        notes=tuple(progress.notes),
        job_seconds=seconds,
        stages=progress.times.seconds(),
        peak_memory=peak_memory(),
    )
    verdict.write(str(writer.folder))
    if (writer.target / STATS_FILE).is_file():  # it goes, and they would with it
        shutil.copyfile(writer.target / STATS_FILE, writer.folder / STATS_FILE)
    writer.publish(name)
    told = f"{verdict.table()}\n{folder}"
    if verdict.passed:
        told += f"\nTry it: python app.py chat {shlex.quote(os.path.relpath(folder))}"
    progress.result({"path": folder, "verdict": verdict.as_dict()}, told)
    return 0 if verdict.passed else 1


def tell_plan(
    args: argparse.Namespace, source: Source, target: str, bits: float, progress: Progress
) -> int:
    """What the job would take, or why it is refused; no weight is read, and nothing written."""
    device, dtype, stats = _check(args, source, target, bits)
    settings = calibration_settings(args)
    tokens = 0 if stats is not None else _tokens_at_once(settings)
    if stats is None and settings.dataset not in DATASETS:  # those would have to be fetched
        load_samples(settings.dataset, Tokenizer.from_folder(args.model), 1, settings.seqlen)
    return _told(Plan(
        target, str(device), dtype_name(dtype),
        preflight.memory_needed(source.config, tokens, dtype), preflight.memory_free(device),
        source.bytes_of(bits), preflight.disk_free(target), disk_bytes(args.model)), progress)


def _told(plan: Plan, progress: Progress) -> int:
    """The plan as the command's result."""
    progress.result({"plan": asdict(plan)}, plan.describe())
    return 0


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16 and the like."""
    return str(dtype).removeprefix("torch.")


def holds_stats_only(folder: str) -> bool:
    """Whether it is what `lite calibrate` left, as when a tutorial names one folder for both."""
    return os.path.isdir(folder) and os.listdir(folder) == [STATS_FILE]


def free_name(path: str) -> str:
    """The last part of `path`, with a number behind it if that is taken."""
    number = 1
    while os.path.lexists(path if number == 1 else f"{path}-{number}"):
        number += 1
    return os.path.basename(path if number == 1 else f"{path}-{number}")


@command
def kv_qparams(args: argparse.Namespace, progress: Progress) -> int:
    """Scales of an int8 KV cache from a calibration, into the model's folder, or into one of their
    own, as LMDeploy's users may have it: they copy them into a workspace then."""
    stats = load_stats(args.stats)
    apart = is_apart(args.model)
    seen = (stats.info.num_blocks, *stats.keys(0).min.shape)
    if not apart:
        config = read_model_config(args.model)
        if seen != (config.num_layers, config.num_kv_heads, config.head_dim):
            raise UserError(
                f"The calibration in {args.stats} is of a model of another shape than "
                f"{args.model}.",
                "Run lite calibrate for this model, or for the one that it was quantized from.",
            )
    kv_heads_per_rank(seen[1], ParallelContext(0, args.num_tp))  # or it tells
    stored = stored_params(args.model)
    if stored is not None and not args.overwrite:
        raise UserError(f"{stored} is there already.", "Give --overwrite to replace it.")
    layers = range(stats.info.num_blocks)
    keys = [(stats.keys(i).min, stats.keys(i).max) for i in layers]
    values = [(stats.values(i).min, stats.values(i).max) for i in layers]
    params = torch.stack([
        torch.stack([head_params(*part, args.kv_sym) for part in pair])
        for pair in zip(keys, values)
    ])
    verdict = None
    ranks = tensor_para_size(args.model)
    if ranks == 1 and not apart:
        verdict = evaluate_model(
            args.model, args.model, evaluation_settings(args), progress,
            KVFormat(args.kv_bits, params),
        )  # fmt: skip
        verdict = replace(verdict, notes=(stats.info.note,), job_seconds=progress.elapsed())
        if not verdict.passed:
            text = f"{verdict.table()}\nNothing was written."
            progress.result({"verdict": verdict.as_dict()}, text)
            return 1
    path = write_kv_qparams(
        args.model,
        keys,
        values,
        symmetric=args.kv_sym,
        num_tp=args.num_tp,
        overwrite=args.overwrite,
    )
    told = (
        f"{path}: used whenever the KV cache has {args.kv_bits} bits. To have it so: "
        f"python app.py config set {shlex.quote(args.model)} kv_cache_dtype=int{args.kv_bits}"
    )
    judged = f"Not judged, because the weights are parted for tp {ranks}."
    if verdict is not None:
        judged = verdict.table()
    elif apart:
        judged = "Not judged, because there is no model beside them."
        told = f"{path}: copy its files into the triton_models/weights of a workspace."
    progress.result(
        {"path": str(path), "verdict": None if verdict is None else verdict.as_dict()},
        f"{judged}\n{told}",
    )
    return 0


@command
def evaluate(args: argparse.Namespace, progress: Progress) -> int:
    """Held-out text; exit code 1 if the model has failed."""
    kv = KVFormat()
    if args.quant_policy:
        config = read_model_config(args.model)
        kv = KVFormat(args.quant_policy, read_kv_params(args.model, config, ParallelContext()))
    if args.plan:
        check_model(args.model, ParallelContext())
        device = pick_device(args.device)
        return _told(Plan(
            None, str(device), dtype_name(pick_dtype(args.dtype, device, args.model)), 0,
            preflight.memory_free(device), 0, 0, disk_bytes(args.model)), progress)
    verdict = evaluate_model(args.model, args.against, evaluation_settings(args), progress, kv)
    progress.result({"verdict": verdict.as_dict()}, verdict.table())
    return 0 if verdict.passed else 1


def _check(
    args: argparse.Namespace, source: Source, target: str, bits: float
) -> tuple[torch.device, torch.dtype, CalibrationStats | None]:
    """What is checked before work on a checkpoint of `bits` a weight, without reading weights or
    text; the earlier calibration that it is made by, if there is one."""
    stats = earlier_stats(args, target)
    if holds_stats_only(target):
        args.overwrite = True  # nothing is lost: `judge_and_publish` takes them along
    preflight.check_target(target, args.model, args.overwrite)
    preflight.check_space(target, source.bytes_of(bits))
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device, args.model)
    tokens = 0 if stats is not None else _tokens_at_once(calibration_settings(args))
    preflight.check_memory(device, preflight.memory_needed(source.config, tokens, dtype))
    return device, dtype, stats


def _prepare(
    args: argparse.Namespace, source: Source, target: str, bits: float, progress: Progress
) -> tuple[torch.device, torch.dtype, Samples | CalibrationStats]:
    """All that is checked before that work, and what the checkpoint is made by: text to calibrate
    on, or an earlier calibration."""
    device, dtype, stats = _check(args, source, target, bits)
    if stats is not None:
        info = stats.info
        progress.note(
            f"{info.note} By the stats of that calibration ({info.samples} windows of "
            f"{info.seqlen} tokens); no text is run again."
        )
        preflight.check_finite(source, progress)
        return device, dtype, stats
    settings = calibration_settings(args)
    with progress.times("calibration text"):
        samples = load_samples(
            settings.dataset,
            Tokenizer.from_folder(args.model),
            settings.samples,
            settings.seqlen,
            seed=settings.seed,
            strict=settings.strict,
        )
    progress.note(samples.note)
    with progress.times("check weights"):
        preflight.check_finite(source, progress)
    return device, dtype, samples


def _tokens_at_once(settings: CalibrationSettings) -> int:
    """One block has to fit, with one window of tokens: batches shrink by themselves."""
    return max(settings.batch_size, 1) * settings.seqlen
