"""Tensor parallelism: who this rank is, and the two collectives that the layers need.

The scheme is Megatron-LM's (Shoeybi et al. 2019): column-parallel into row-parallel, one
all-reduce after attention and one after the MLP.
"""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist
from torch import Tensor

from backend.errors import UserError


class ParallelContext:
    """A rank's place in its tensor-parallel group. Passed as an argument to every layer.

    `ParallelContext()` is a group of one, in which the collectives return their input.

    Args:
        rank: this process, from 0.
        world_size: processes in the group.
        group: the torch.distributed group; None for a group of one.
    """

    def __init__(
        self, rank: int = 0, world_size: int = 1, group: dist.ProcessGroup | None = None
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.group = group

    @classmethod
    def connect(
        cls, rank: int, world_size: int, init_method: str, device: torch.device,
        timeout_s: float = 600.0,
    ) -> ParallelContext:
        """Meet the other ranks: gloo between CPUs, NCCL between GPUs. Blocks until all are there.

        Args:
            init_method: torch.distributed's address, as `tcp://127.0.0.1:29500` or `file:///...`.
            device: this rank's device.
            timeout_s: seconds until a collective whose partners are gone raises.
        """
        if world_size == 1:
            return cls()
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=init_method,
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        return cls(rank, world_size, dist.group.WORLD)

    def close(self) -> None:
        """Leave the group."""
        if self.group is not None:
            dist.destroy_process_group()
            self.group = None

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of all ranks' x, in place; every rank gets it."""
        if self.world_size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """All ranks' x [rows, n] side by side, [rows, world_size * n], on every rank."""
        if self.world_size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x, in place, on every rank."""
        if self.world_size > 1:
            dist.broadcast(x, src=0, group=self.group)
        return x

    def divide(self, total: int, what: str) -> int:
        """total / world_size.

        Raises:
            UserError: if it does not come out even; `what` names the thing divided.
        """
        if total % self.world_size:
            raise UserError(
                f"tp {self.world_size} does not divide the model's {total} {what}.",
                f"Choose a tp that divides {total}.",
                field="tp",
            )
        return total // self.world_size
