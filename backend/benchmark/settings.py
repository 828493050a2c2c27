"""From a command line to an engine: its options, its way of starting, a model of random weights."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

from tqdm import tqdm

from backend import config
from backend.config import EngineConfig, SamplingParams
from backend.engine.inline import ThreadHandle
from backend.engine.launcher import Handle, ProcessHandle
from backend.errors import UserError
from backend.workspace.settings import engine_options

MAX_CONCURRENCY = 4096  # as EngineConfig.max_batch_size


def launcher(args: argparse.Namespace) -> Callable[[], Handle]:
    """How the engine is started."""
    return ThreadHandle if args.inline else ProcessHandle


async def engine_config(args: argparse.Namespace, concurrency: int) -> EngineConfig:
    """The engine's options: as given, else those that measure `concurrency` streams as asked.

    Raises:
        UserError: no model is named, or two; or an option is out of bounds.
    """
    defaults: dict[str, object] = {
        # Random prompts have nothing in common, and repeated rounds must not help one another.
        "enable_prefix_caching": False,
        "max_batch_size": max(concurrency, EngineConfig.max_batch_size),
    }
    # Told now, not after minutes of loading.
    SamplingParams(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k)
    if concurrency > MAX_CONCURRENCY:
        raise UserError(f"--concurrency may be {MAX_CONCURRENCY} at most, not {concurrency}.")
    model = getattr(args, "model", None)
    if (model is None) == (args.random_weights is None):
        raise UserError(
            "A benchmark needs either a model or --random-weights.",
            "Name a model's folder, or a shape such as --random-weights llama-2-7b.",
        )
    if model is None:
        model = await random_model(args)
    elif args.quantization is not None:
        raise UserError("--quantization is for --random-weights; a model's folder tells its own.")
    folder = os.path.abspath(os.path.expanduser(model))
    defaults |= engine_options(folder, vars(args))
    # Absolute: the engine's process has another working directory.
    return replace(config.from_namespace(EngineConfig, args, **defaults), model=folder)


async def random_model(args: argparse.Namespace) -> str:
    """Folder of the checkpoint that --random-weights names, written there if it is not yet.

    Raises:
        UserError: the shape is unknown, or the folder cannot be written.
    """
    dtype = getattr(args, "dtype", "auto")
    if dtype == "auto":
        dtype = "float16"
    parent = args.random_weights_dir or default_folder()
    name = "-".join(filter(None, (args.random_weights, args.quantization, dtype)))
    folder = os.path.join(os.path.expanduser(parent), name)
    # A process of its own, because a GPU's context would stay and be counted as memory in use.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        await asyncio.get_running_loop().run_in_executor(
            pool, write_checkpoint, folder, args.random_weights, args.quantization, dtype
        )
    return folder


def write_checkpoint(folder: str, shape: str, quantization: str | None, dtype: str) -> None:
    """Write random weights, with a progress bar. See `write_random_checkpoint` for the rest."""
    from backend.models.random_weights import write_random_checkpoint

    with tqdm(desc="random weights", unit="B", unit_scale=True, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        write_random_checkpoint(folder, shape, quantization, dtype=dtype, progress=progress)


def default_folder() -> str:
    """Where random weights are kept for the next run."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return os.path.join(cache, "lmdesk", "random-weights")
