"""Tensor parallel ranks: further processes that compute their part of every step."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from backend.config import EngineConfig
from backend.engine import messages
from backend.engine.launcher import ProcessHandle
from backend.layers.parallel import ParallelContext


@dataclass(slots=True)
class RankGroup:
    """The ranks beside rank 0: their pipes, and the file through which they meet."""

    rendezvous: str = ""
    connections: list[Connection] = field(default_factory=list)
    processes: list[ProcessHandle] = field(default_factory=list)


def start_ranks(config: EngineConfig, on_death: Callable[[], None] | None) -> RankGroup:
    """Start ranks 1 ... tp-1; `on_death` is called (from a thread) when one of them ends."""
    group = RankGroup()
    if config.tp == 1:
        return group
    # In a directory of mode 0700, so that nobody else can join.
    group.rendezvous = os.path.join(tempfile.mkdtemp(prefix="lmdesk-"), "rendezvous")
    for rank in range(1, config.tp):
        process = ProcessHandle(arguments=("rank",))
        start = messages.StartRank(config, rank, group.rendezvous)
        process.connection.send_bytes(messages.encode(start))
        group.connections.append(process.connection)
        group.processes.append(process)
        if on_death is not None:
            threading.Thread(target=_watch, args=(process, on_death), daemon=True).start()
    return group


def _watch(process: ProcessHandle, on_death: Callable[[], None]) -> None:
    process.wait()
    on_death()


def join_group(config: EngineConfig, rank: int, rendezvous: str) -> ParallelContext:
    """Meet the other ranks: NCCL on GPUs, gloo on CPUs, over loopback only."""
    if config.tp == 1:
        return ParallelContext()
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    return ParallelContext.join(rank, config.tp, rendezvous, config.device)
