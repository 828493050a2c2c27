"""`guide measure`: one step of the walk is made, judged over held-out text, served and timed.

See backend/guide.py for what comes of it. Of each step the same is measured, by the same engine
that serves.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from backend import guide
from backend.benchmark.engine_session import EngineSession, open_engine, random_prompt
from backend.benchmark.metrics import Timeline
from backend.config import EngineConfig, SamplingParams
from backend.data_dir import results_dir
from backend.engine.types import Request
from backend.errors import UserError
from backend.footprint import measure as measure_footprint
from backend.guide import QUESTIONS, STEPS, Figures, Step, Walk
from backend.layers.parallel import ParallelContext
from backend.models.kv_params import read_kv_params
from backend.models.loader import has_w4_kernel
from backend.models.registry import read_model_config
from backend.tokenizer import Tokenizer
from quantize import preflight
from quantize.evaluate import EvaluationSettings, disk_bytes, evaluate, pick_device
from quantize.model_run import KVFormat, prompt_ids
from quantize.preflight import GROUP_SIZES, Source
from quantize.progress import Progress
from quantize.verdict import VERDICT_FILE, Verdict

PROJECT = Path(__file__).resolve().parents[1]
POOL_TOKENS = 4096  # of the KV cache while measuring: others may use the device as well
PROMPT_TOKENS = 64
ROUNDS = 3


def show(args: argparse.Namespace) -> int:
    """Print all figures, and the recommendation."""
    walk = Walk(args.model)
    found = walk.figures()
    if not found:
        raise UserError(f"Nothing was measured of {args.model} yet.",
                        "Run: python app.py guide measure MODEL")
    print(guide.table(list(found.values())))
    best = walk.recommended()
    print(f"\nRecommended: {best.serve_command}" if best else "\nNo step is good enough.")
    return 0


def run(args: argparse.Namespace) -> int:
    """Measure one step, or all."""
    progress = Progress(args.progress)
    try:
        walk = Walk(args.model)
        source = preflight.check_source(args.model)
        for step in STEPS.values() if args.step == "all" else (STEPS[args.step],):
            figures = _measure(walk, source, step, args, progress)
            path = walk.write(figures)
            progress.result({"path": str(path), "step": step.id}, f"{step.id}: {path}")
    except UserError as error:
        progress.error(error)
        raise
    return 0 if args.step != "all" or args.progress == "json" else show(args)


def _measure(
    walk: Walk, source: Source, step: Step, args: argparse.Namespace, progress: Progress
) -> Figures:
    start = time.monotonic()
    device = pick_device(args.device)
    served = _quantized(walk, source, args, device) if step.weights else walk.model
    verdict = _judged(walk, served, step, args, progress)
    config = _engine_config(served, step, device)
    total = measure_footprint(config).total
    progress.stage("serve", len(QUESTIONS) + ROUNDS)
    info, timed, rates, replies = asyncio.run(_served(config, args.reply_tokens, progress))
    options = [word for name in ("quant_policy", "dtype")
               if getattr(config, name) != getattr(EngineConfig(), name)
               for word in (f"--{name.replace('_', '-')}", str(getattr(config, name)))]
    return Figures(
        step=step.id,
        served=served,
        device=info.device,
        dtype=info.dtype,
        quantization=info.quantization,
        weight_bytes=info.weight_bytes,
        disk_bytes=disk_bytes(served),
        kv_bytes_per_token=info.kv_bytes_per_token,
        kv_bits=info.kv_bits,
        total_bytes=total,
        ttft_s=statistics.median(t.ttft for t in timed),
        tokens_per_s=statistics.median(rates) if rates else 0.0,
        nats=verdict.model.nats,
        perplexity=verdict.model.perplexity,
        loss=verdict.comparison.loss if verdict.comparison else None,
        passed=verdict.passed,
        sentence=verdict.sentence,
        text=verdict.text,
        replies=tuple(replies),
        options=tuple(options),
        created=time.time(),
        seconds=time.monotonic() - start,
    )


def _quantized(
    walk: Walk, source: Source, args: argparse.Namespace, device: torch.device
) -> str:
    """Folder of the 4-bit model of the walk; made, by `lite auto_awq`, unless it is there."""
    target = results_dir() / f"{os.path.basename(walk.model)}-guide-w4"
    for folder in (target, target.with_name(f"{target.name}.failed")):
        if _made_of(folder) == walk.model:
            return str(folder)
    if target.exists():  # of another model of this name
        target = target.with_name(f"{target.name}-{walk.folder.name[-12:]}")
        if _made_of(target) == walk.model:
            return str(target)
    small = device.type == "cpu"
    words = [
        "lite", "auto_awq", walk.model, "--work-dir", str(target), "--device", args.device,
        "--calib-samples", str(args.calib_samples or (32 if small else 128)),
        "--calib-seqlen", str(args.calib_seqlen or (512 if small else 2048)),
        "--eval-tokens", str(args.eval_tokens), "--w-group-size", str(_group_size(source)),
        "--progress", args.progress,
    ]  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    # A process of its own, whose memory is given back; its events are this job's.
    code = subprocess.run([sys.executable, str(PROJECT / "app.py"), *words]).returncode
    if code not in (0, 1):  # it has told why
        raise SystemExit(code)
    return str(target) if code == 0 else f"{target}.failed"


def _made_of(folder: Path) -> str:
    """Which model a quantized one was made of; "" if the folder is none."""
    try:
        verdict = json.loads((folder / VERDICT_FILE).read_text(encoding="utf-8"))
        return os.path.realpath(verdict["against"]["model"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _group_size(source: Source) -> int:
    """The tutorials' 128, or the largest that divides the model.

    Raises:
        UserError: none does.
    """
    for size in GROUP_SIZES:
        try:
            preflight.check_group_size(source, size)
            return size
        except UserError as error:
            refusal = error
    raise refusal


def _judged(
    walk: Walk, served: str, step: Step, args: argparse.Namespace, progress: Progress
) -> Verdict:
    """Over held-out text, against the model in 16 bits."""
    settings = EvaluationSettings(tokens=args.eval_tokens, device=args.device)
    kv = KVFormat()
    if step.kv:
        model = read_model_config(served)
        kv = KVFormat(8, read_kv_params(served, model, ParallelContext()))
    against = None if step == STEPS["fp16"] else walk.model
    return evaluate(served, against, settings, progress, kv)


def _engine_config(served: str, step: Step, device: torch.device) -> EngineConfig:
    """How the step is served. On a CPU 4-bit weights stay so in bfloat16 only."""
    four_bits_here = step.weights and device.type == "cpu" and has_w4_kernel(torch.bfloat16, device)
    return EngineConfig(
        served,
        device=device.type,
        dtype="bfloat16" if four_bits_here else "auto",
        quant_policy=8 if step.kv else 0,
        max_batch_size=1,
        enable_prefix_caching=False,
        kv_cache_tokens=POOL_TOKENS,
    )


async def _served(
    config: EngineConfig, reply_tokens: int, progress: Progress
) -> tuple[Any, list[Timeline], list[float], list[str]]:
    """(what the engine serves, times of the questions, tokens/s, replies)."""
    tokenizer = Tokenizer.from_folder(config.model)
    async with open_engine(config) as session:
        rng = random.Random(0)
        length = min(PROMPT_TOKENS, session.info.session_len - reply_tokens - 1)
        tokens = max(min(reply_tokens, session.info.session_len - 16), 1)
        fixed = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        rates = []
        for number in range(-1, ROUNDS):  # the first warms up
            prompt = random_prompt(max(length, 8), session.info.vocab_size, rng)
            timeline, _ = await _ask(session, prompt, fixed, f"speed-{number}")
            if number >= 0:
                rates += [1 / timeline.tpot] if timeline.tpot else []
                progress.step()
        greedy = SamplingParams(temperature=0.0, max_tokens=tokens)
        timed, replies = [], []
        for number, question in enumerate(QUESTIONS):
            prompt = prompt_ids(config.model, tokenizer, question)
            timeline, ids = await _ask(session, prompt, greedy, f"question-{number}")
            timed.append(timeline)
            replies.append(tokenizer.decode(ids).strip())
            progress.step()
        return session.info, timed, rates, replies


async def _ask(
    session: EngineSession, prompt: list[int], sampling: SamplingParams, name: str
) -> tuple[Timeline, list[int]]:
    timeline, ids = Timeline(session.clock(), len(prompt)), []
    async for output in session.engine.generate(Request(name, prompt, sampling)):
        if output.finish_reason == "error":
            raise UserError(f"The engine failed a request: {output.error}")
        if output.token_ids:
            timeline.events.append((session.clock(), len(output.token_ids)))
            ids += output.token_ids
    if not timeline.events:  # the reply is empty
        timeline.events.append((session.clock(), 0))
    return timeline, ids
