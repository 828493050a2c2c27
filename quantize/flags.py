"""What the flags of `lite` say."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace

from backend.errors import UserError
from quantize.calibrate import CalibrationSettings
from quantize.evaluate import EvaluationSettings
from quantize.stats import STATS_FILE, CalibrationStats, load_stats

# What each is called in CalibrationSettings; none has a value unless it was given.
CALIBRATION_FLAGS = {
    "calib_dataset": "dataset",
    "calib_samples": "samples",
    "calib_seqlen": "seqlen",
    "strict_dataset": "strict",
    "batch_size": "batch_size",
    "seed": "seed",
}


def target_folder(args: argparse.Namespace, suffix: str) -> str:
    """--work-dir, or a folder in the current one that has the model's name and a suffix."""
    name = os.path.basename(os.path.abspath(os.path.expanduser(args.model)))
    return os.path.abspath(os.path.expanduser(args.work_dir or f"{name}-{suffix}"))


def calibration_settings(args: argparse.Namespace) -> CalibrationSettings:
    """What the flags say of the text to calibrate on."""
    given = {field: getattr(args, flag) for flag, field in CALIBRATION_FLAGS.items()}
    return replace(CalibrationSettings(), **{k: v for k, v in given.items() if v is not None})


def earlier_stats(args: argparse.Namespace, target: str) -> CalibrationStats | None:
    """Those of --stats; or those in --work-dir, if no flag asks for a calibration of its own.

    Raises:
        UserError: there are none in --stats, they are of another model, or a flag contradicts.
    """
    asked = [flag for flag in CALIBRATION_FLAGS if getattr(args, flag) is not None]
    if args.stats is None:
        there = os.path.isfile(os.path.join(target, STATS_FILE))
        return load_stats(target, args.model) if there and not asked else None
    if asked:
        raise UserError(
            f"--{asked[0].replace('_', '-')} is for a new calibration, and --stats takes an "
            "earlier one.",
            "Leave out one of them.",
            field=asked[0],
        )
    return load_stats(os.path.expanduser(args.stats), args.model)


def evaluation_settings(args: argparse.Namespace) -> EvaluationSettings:
    """What the flags say of the verdict."""
    return EvaluationSettings(
        tokens=args.eval_tokens,
        seqlen=getattr(args, "eval_seqlen", EvaluationSettings.seqlen),
        threshold=args.threshold,
        device=args.device,
        dtype=args.dtype,
    )
