"""Hidden states of all samples between two blocks: where they lie; a few run at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from backend.errors import UserError


def in_batches(
    samples: int, size: int, work: Callable[[slice], None], note: Callable[[str], None]
) -> int:
    """Do `work` on all samples in order, at most `size` at a time; fewer if memory runs out.

    What `work` had done of a batch when memory ran out must not count: it is called again for the
    same samples.

    Args:
        note: told when the batch is made smaller.

    Returns:
        The size that fitted.

    Raises:
        UserError: one sample alone does not fit.
    """
    start = 0
    while start < samples:
        try:
            work(slice(start, min(start + size, samples)))
            start += size
            continue
        except torch.OutOfMemoryError:
            if size == 1:
                raise UserError(
                    "The GPU's memory does not hold one block of this model and one sample.",
                    "Use shorter samples (--calib-seqlen), or free the GPU's memory.",
                ) from None
        # Not within the except: what the error's frames hold is let go of only after it.
        size = min(size, samples) // 2 or 1
        note(f"The GPU's memory ran out; going on with {size} sample(s) at a time.")
        torch.cuda.empty_cache()
    return size


class HiddenStore:
    """Hidden states [samples, S, H] between blocks: in memory up to a bound, the rest on disk.

    `store[start:stop]` reads samples, `store[start:stop] = hidden` writes them, in place; both
    take the store's dtype. The file is without a name from the start, so that no end of the
    process, however sudden, leaves it behind.

    Args:
        shape: (samples, S, H).
        dtype: of the hidden states.
        device: where the samples in memory lie, and where those read are brought.
        memory_bytes: how much of them may lie there.
        folder: where the file is made if they are more; by default the system's for such files.

    Raises:
        UserError: the disk has no room for the rest.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        memory_bytes: int,
        folder: str | Path | None = None,
    ) -> None:
        samples, length, size = shape
        sample_bytes = length * size * dtype.itemsize
        self.samples = samples
        self.device = device
        self.in_memory = min(samples, memory_bytes // sample_bytes)
        self._memory = torch.empty((self.in_memory, length, size), dtype=dtype, device=device)
        rest = samples - self.in_memory
        self.disk_bytes = rest * sample_bytes
        self._disk = self._memory.new_empty((0, length, size), device="cpu")
        if rest:
            flat = _unnamed_file(rest * length * size, dtype, folder)
            self._disk = flat.view(rest, length, size)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, samples: slice) -> Tensor:
        memory, disk = self._parts(samples)
        if not len(disk):
            return memory.clone()
        return torch.cat((memory, disk.to(self.device)))

    def __setitem__(self, samples: slice, hidden: Tensor) -> None:
        memory, disk = self._parts(samples)
        memory.copy_(hidden[: len(memory)])
        disk.copy_(hidden[len(memory) :])

    def _parts(self, samples: slice) -> tuple[Tensor, Tensor]:
        start, stop, step = samples.indices(self.samples)
        assert step == 1
        bound = self.in_memory
        return (
            self._memory[min(start, bound) : min(stop, bound)],
            self._disk[max(start - bound, 0) : max(stop - bound, 0)],
        )


def _unnamed_file(count: int, dtype: torch.dtype, folder: str | Path | None) -> Tensor:
    """`count` elements in a mapped file that is gone when the tensor is."""
    size = count * dtype.itemsize
    folder = folder or tempfile.gettempdir()
    try:
        with tempfile.NamedTemporaryFile(prefix="hidden-", dir=folder) as file:
            # Reserved now: a mapped page that finds the disk full later would kill the process.
            os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype)
    except OSError as error:
        raise UserError(
            f"{size / 1e9:.1f} GB of hidden states find no place in {folder}: {error.strerror}.",
            "Free the space, or calibrate with fewer or shorter samples.",
        ) from error
