"""Token embedding and output head, the vocabulary split over the ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backend.layers.linear import BuildContext
from backend.layers.linear_method import WeightSlot
from backend.layers.methods.unquantized import UnquantizedMethod


class VocabParallelEmbedding(nn.Module):
    """Rows of a [vocab_size, hidden_size] table; a rank keeps an equal run of them.

    If the ranks do not divide the vocabulary, the last ones' rows are fewer, and the rest of their
    parameter stays zero.

    forward: ids [T] below vocab_size -> [T, hidden_size], the same on every rank.

    Args:
        name: in the checkpoint, without ".weight".
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, name: str, context: BuildContext
    ) -> None:
        super().__init__()
        self.parallel = context.parallel
        self.vocab_size = vocab_size
        self.name = name
        rows = -(-vocab_size // self.parallel.world_size)
        self.start = min(self.parallel.rank * rows, vocab_size)
        self.length = min(rows, vocab_size - self.start)
        weight = torch.empty(rows, hidden_size, dtype=context.dtype, device=context.device)
        weight[self.length :] = 0
        self.weight = nn.Parameter(weight, requires_grad=False)

    def weight_slots(self) -> dict[str, WeightSlot]:
        """The checkpoint's tensor for this layer, by name."""
        hidden_size = self.weight.shape[1]
        rows = slice(self.start, self.start + self.length)
        return {
            f"{self.name}.weight": WeightSlot(
                (self.vocab_size, hidden_size),
                (rows, slice(0, hidden_size)),
                self.weight.data[: self.length],
            )
        }

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.parallel.world_size == 1:
            return F.embedding(input_ids, self.weight)
        local = input_ids - self.start
        elsewhere = (local < 0) | (local >= self.length)
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.parallel.all_reduce(rows.masked_fill(elsewhere[:, None], 0))


class ParallelLMHead(nn.Module):
    """Hidden states to logits, with a table of its own or the embedding's.

    forward: hidden [rows, hidden_size] -> float32 [rows, vocab_size] on every rank. All ranks must
    call it together. Its weights are never quantized, whatever the layers' are.

    Args:
        table: the weights; the embedding itself if the two are tied. On a CPU the head then keeps
            a copy, in the layout that it multiplies fastest.
        normalized: divide each row of the table by its L2 norm (Baichuan 2's NormHead).
    """

    table: VocabParallelEmbedding | None

    def __init__(
        self, table: VocabParallelEmbedding, context: BuildContext, normalized: bool = False
    ) -> None:
        super().__init__()
        self.parallel = context.parallel
        self.method = UnquantizedMethod()
        self.batch_invariant = context.batch_invariant
        self.vocab_size = table.vocab_size
        self.table = table
        self.normalized = normalized

    def process_weights_after_loading(self) -> None:
        """Call once, when the table is filled."""
        assert self.table is not None
        self.weight = self.table.weight
        if self.normalized:
            # Some rows at a time: a float32 copy of all would be the model's largest tensor by far.
            parts = [F.normalize(rows.float()).to(rows.dtype) for rows in self.weight.split(8192)]
            self.weight = nn.Parameter(torch.cat(parts), requires_grad=False)
        self.table = None  # if it is the head's own, this frees the layout that loading needed
        self.method.process_weights_after_loading(self)

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.method.apply(self, hidden, None).float()
        return self.parallel.all_gather(logits)[:, : self.vocab_size]
