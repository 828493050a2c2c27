"""Tensor parallel ranks: further processes that compute their part of every step."""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import torch

from backend.config import EngineConfig
from backend.engine import messages
from backend.engine.launcher import ProcessHandle
from backend.errors import UserError
from backend.layers.parallel import ParallelContext

STACK_SIZE_LIMIT = 0  # CU_LIMIT_STACK_SIZE of the driver's cuCtxSetLimit


@dataclass(slots=True)
class RankGroup:
    """The ranks beside rank 0: their pipes, and the file through which they meet."""

    rendezvous: str = ""
    connections: list[Connection] = field(default_factory=list)
    processes: list[ProcessHandle] = field(default_factory=list)


def start_ranks(
    config: EngineConfig, on_death: Callable[[UserError | None], None] | None
) -> RankGroup:
    """Start ranks 1 ... tp-1.

    `on_death` is called (from a thread) when one of them ends, or with the reason when it cannot
    load its part of the model.
    """
    group = RankGroup()
    if config.tp == 1:
        return group
    # In a directory of mode 0700, so that nobody else can join.
    directory = tempfile.mkdtemp(prefix="lmdesk-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    group.rendezvous = os.path.join(directory, "rendezvous")
    for rank in range(1, config.tp):
        process = ProcessHandle()
        start = messages.StartRank(config, rank, group.rendezvous)
        process.connection.send_bytes(messages.encode(start))
        group.connections.append(process.connection)
        group.processes.append(process)
        if on_death is not None:
            watched = (process.connection, on_death)
            threading.Thread(target=_watch, args=watched, daemon=True).start()
    return group


def _watch(connection: Connection, on_death: Callable[[UserError | None], None]) -> None:
    reason: UserError | None = None
    try:
        # In pieces, because a pipe that is being waited for stays open when rank 0 closes it.
        while not connection.poll(1.0):
            pass
        failed = messages.decode_event(connection.recv_bytes())
        assert isinstance(failed, messages.LoadFailed)  # else a rank says nothing
        reason = UserError(failed.message, failed.hint)
    except (EOFError, OSError):
        if connection.closed:  # by rank 0 itself, which has let the ranks go
            return
    on_death(reason)


def join_group(config: EngineConfig, rank: int, rendezvous: str) -> ParallelContext:
    """Meet the other ranks: NCCL between GPUs, gloo between CPUs, over loopback only."""
    if config.tp == 1:
        return ParallelContext()
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    device = resolve_device(config, rank)
    return ParallelContext.connect(rank, config.tp, f"file://{rendezvous}", device)


def resolve_device(config: EngineConfig, rank: int) -> torch.device:
    """The device of a rank.

    Raises:
        UserError: no GPU where one is asked for, or fewer than ranks.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise UserError("There is no usable NVIDIA GPU here.", "Use --device cpu.", field="device")
    if config.device == "cpu" or not available:
        return torch.device("cpu")
    if config.tp > torch.cuda.device_count():
        raise UserError(
            f"tp is {config.tp}, but there are {torch.cuda.device_count()} GPUs.",
            "Lower --tp, or use --device cpu.",
            field="tp",
        )
    torch.cuda.set_device(rank)
    if config.tp == 1:
        _give_back_stacks()
    return torch.device("cuda", rank)


def _give_back_stacks() -> None:
    """Let the driver keep no more stack than each kernel is known to need.

    It sets 1 KB aside for every thread that the GPU can hold at once, 277 MB on an H200, for
    kernels whose need is not known before they run. Ours and torch's say theirs. NCCL's call
    functions by pointer, so this is for a GPU alone.
    """
    torch.cuda.synchronize()  # the limit is the context's: there must be one
    with suppress(OSError, AttributeError):  # a driver of another name: nothing is saved
        ctypes.CDLL("libcuda.so.1").cuCtxSetLimit(STACK_SIZE_LIMIT, ctypes.c_size_t(0))
