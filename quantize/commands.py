"""The command lines of `lite`; what runs them is imported only when it is run."""

from __future__ import annotations

import argparse
from typing import Any

from backend.config import parse_bool
from backend.guide import STEPS


def add_commands(group: Any) -> None:
    """Add one subcommand for each job to argparse's `group` of subparsers."""
    text = "what a model's inputs, keys and values are like"
    sub = _command(group, "calibrate", text, _calibrate)
    _model(sub, "./NAME-stats")
    _calibration(sub)
    _device(sub)

    sub = _command(group, "auto_awq", "weights in 4 bits (W4A16), by AWQ", _auto_awq)
    _model(sub, "./NAME-awq")
    sub.add_argument("--w-bits", type=int, choices=(4,), default=4, help="bits a weight")
    text = "inputs that share a scale (default: 128)"
    sub.add_argument("--w-group-size", type=int, choices=(128, 64, 32), default=128, help=text)
    _flag(sub, "--w-sym", False, "ranges as wide below 0 as above")
    _flag(sub, "--search-scale", True, "search the channels' scales; false leaves them as they are")
    _flag(sub, "--search-clip", True, "search how much of each group's range to cut off")
    _flag(sub, "--gptq", True, "let later columns make up for the rounding of earlier ones")
    _calibration(sub)
    _stats(sub)
    _device(sub)
    _verdict(sub)
    _plan(sub)

    sub = _command(group, "smooth_quant", "weights and tokens in 8 bits (W8A8)", _smooth_quant)
    _model(sub, "./NAME-w8a8")
    _calibration(sub)
    _stats(sub)
    _device(sub)
    _verdict(sub)
    _plan(sub)

    text = "scales of an int8 KV cache, from a calibration"
    sub = _command(group, "kv_qparams", text, _kv_qparams)
    sub.add_argument("stats", metavar="WORK_DIR", help="--work-dir of lite calibrate")
    text = "folder of the model that will be served; or an empty one, to copy them from"
    sub.add_argument("model", metavar="MODEL", help=text)
    sub.add_argument("--kv-bits", type=int, choices=(8,), default=8, help="bits of K and V")
    _flag(sub, "--kv-sym", False, "ranges as wide below 0 as above")
    sub.add_argument("--num-tp", type=count, default=1, help="ranks to part them into (default: 1)")
    _flag(sub, "--overwrite", False, "replace those that are there")
    _device(sub)
    _verdict(sub)

    text = "how good a model is, by held-out text"
    sub = _command(group, "evaluate", text, _evaluate)
    sub.add_argument("model", metavar="MODEL", help="folder of the model")
    sub.add_argument("--against", metavar="MODEL", help="the model that it was quantized from")
    _device(sub)
    text = "bits of its KV cache: 8, 4, or 0 (default) for the number format computed in"
    sub.add_argument("--quant-policy", type=int, choices=(0, 4, 8), default=0, help=text)
    text = "longest context in tokens (default: 512)"
    sub.add_argument("--eval-seqlen", type=count, default=512, help=text)
    _verdict(sub)
    _plan(sub)


def add_guide_command(commands: Any) -> None:
    """Add `guide`, which walks through the ways to serve a model."""
    text = "16 bits, int8 KV cache, 4-bit weights, both: measured, compared, recommended"
    kinds = commands.add_parser("guide", help=text, description=text).add_subparsers(
        required=True, metavar="measure|show"
    )
    sub = _command(kinds, "measure", "make, judge, serve and time a step", _guide_measure)
    sub.add_argument("model", metavar="MODEL", help="folder of the 16-bit model")
    text = "fp16, kv8 (int8 KV cache), w4 (4-bit weights), both, or all of them (default)"
    sub.add_argument("--step", choices=(*STEPS, "all"), default="all", help=text)
    text = "of held-out text to judge by (default: 8192)"
    sub.add_argument("--eval-tokens", type=count, default=8192, metavar="TOKENS", help=text)
    text = "longest reply (default: 64)"
    sub.add_argument("--reply-tokens", type=count, default=64, metavar="TOKENS", help=text)
    text = "windows of text to calibrate on (default: 128 on a GPU, 32 on a CPU)"
    sub.add_argument("--calib-samples", type=count, help=text)
    text = "tokens of each (default: 2048 on a GPU, 512 on a CPU)"
    sub.add_argument("--calib-seqlen", type=count, help=text)
    text = "auto (default) takes a GPU if there is one"
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help=text)
    text = "what was measured, and what follows"
    sub = kinds.add_parser("show", help=text, description=text, allow_abbrev=False)
    sub.add_argument("model", metavar="MODEL", help="folder of the 16-bit model")
    sub.set_defaults(run=_guide_show)


def _command(group: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    sub: argparse.ArgumentParser = group.add_parser(
        name, help=text, description=text, allow_abbrev=False
    )
    sub.set_defaults(run=run)
    text = "text for people, or json: an event a line on standard output"
    sub.add_argument("--progress", choices=("text", "json"), default="text", help=text)
    return sub


def _model(sub: argparse.ArgumentParser, folder: str) -> None:
    sub.add_argument("model", metavar="MODEL", help="folder of the 16-bit model")
    text = f"where the result goes (default: {folder})"
    sub.add_argument("--work-dir", metavar="DIR", help=text)
    _flag(sub, "--overwrite", False, "replace that folder, once the new result is complete")


def _plan(sub: argparse.ArgumentParser) -> None:
    text = "only say what it would take, or why it would be refused"
    sub.add_argument("--plan", action="store_true", help=text)


def _stats(sub: argparse.ArgumentParser) -> None:
    text = (
        "--work-dir of an earlier lite calibrate: quantize by its stats and run no text again; "
        "those in --work-dir are taken if no flag asks for another calibration"
    )
    sub.add_argument("--stats", metavar="DIR", help=text)


def _calibration(sub: argparse.ArgumentParser) -> None:
    """None of them has a default here: whether one was given decides if earlier stats are taken."""
    text = (
        "bundled (default), c4, ptb, wikitext2 or pileval, or a .txt or .jsonl file or a folder "
        "of them"
    )
    sub.add_argument("--calib-dataset", metavar="DATA", help=text)
    text = "windows of text (default: 128)"
    sub.add_argument("--calib-samples", type=count, help=text)
    text = "tokens of each (default: 2048)"
    sub.add_argument("--calib-seqlen", type=count, help=text)
    text = "refuse if DATA cannot be had; else bundled text is used"
    _flag(sub, "--strict-dataset", None, text)
    text = "windows at a time (default: what memory allows)"
    sub.add_argument("--batch-size", type=count, help=text)
    sub.add_argument("--seed", type=int, help="of the choice of windows (default: 0)")


def _device(sub: argparse.ArgumentParser) -> None:
    text = "auto (default) takes a GPU if there is one"
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help=text)
    text = "number format to compute in; auto (default) is float32 on a CPU, 16 bit on a GPU"
    formats = ("auto", "float32", "bfloat16", "float16")
    sub.add_argument("--dtype", choices=formats, default="auto", help=text)


def _verdict(sub: argparse.ArgumentParser) -> None:
    text = "nats a token that may be lost (default: 0.05)"
    sub.add_argument("--threshold", type=float, default=0.05, metavar="NATS", help=text)
    text = "of held-out text to judge by (default: 32768)"
    sub.add_argument("--eval-tokens", type=count, default=32768, metavar="TOKENS", help=text)


def _flag(sub: argparse.ArgumentParser, name: str, default: bool | None, text: str) -> None:
    """`--name` alone means true."""
    sub.add_argument(
        name, nargs="?", const=True, default=default, type=parse_bool, metavar="true|false",
        help=f"{text} (default: {str(bool(default)).lower()})",
    )


def count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 expected, not {text!r}")
    return int(text)


def _calibrate(args: argparse.Namespace) -> int:
    from quantize.lite import calibrate

    return calibrate(args)


def _auto_awq(args: argparse.Namespace) -> int:
    from quantize.lite import auto_awq

    return auto_awq(args)


def _smooth_quant(args: argparse.Namespace) -> int:
    from quantize.lite import smooth_quant

    return smooth_quant(args)


def _kv_qparams(args: argparse.Namespace) -> int:
    from quantize.lite import kv_qparams

    return kv_qparams(args)


def _evaluate(args: argparse.Namespace) -> int:
    from quantize.lite import evaluate

    return evaluate(args)


def _guide_measure(args: argparse.Namespace) -> int:
    from quantize.guide import run

    return run(args)


def _guide_show(args: argparse.Namespace) -> int:
    from quantize.guide import show

    return show(args)
