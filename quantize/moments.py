"""What the inputs of a linear are like, as far as rounding it needs to know: H = mean(x xᵀ).

The error of a product, mean |(W' - W) x|² over every calibration token, is e H eᵀ for each row e
of W' - W: no token is needed again, however many roundings are tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

ROWS = 8192  # of a matrix at a time, so that temporaries stay below a few GB for any model


class InputMoments:
    """Second moment and mean magnitude of a linear's inputs, summed in float32.

    Attributes:
        gram: float32 [K, K], mean(x xᵀ) after `finish`.
        absmean: float32 [K], mean(|x|) after `finish`.
        tokens: how many inputs were seen.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.gram = torch.zeros(in_features, in_features, device=device)
        self.absmean = torch.zeros(in_features, device=device)
        self.tokens = 0
        # Taken now: memory must not run out between two linears of one batch.
        self._product = torch.empty_like(self.gram) if self.gram.is_cuda else None

    def add(self, x: Tensor) -> None:
        """x [T, K] of any float dtype."""
        if self._product is not None and x.dtype != torch.float32:
            # Products of 16-bit numbers are exact in float32, which tensor cores sum in.
            self.gram += torch.mm(x.t(), x, torch.float32, out=self._product)
        else:
            x = x.float()
            self.gram.addmm_(x.t(), x)
        self.absmean += torch.linalg.vector_norm(x, ord=1, dim=0, dtype=torch.float32)
        self.tokens += x.shape[0]

    def finish(self) -> None:
        """From sums to means; call once, after the last `add`."""
        self._product = None
        self.gram /= self.tokens
        self.absmean /= self.tokens

    def divide(self, scale: Tensor) -> None:
        """As if every input had been divided by scale [K]."""
        self.gram /= scale
        self.gram /= scale[:, None]
        self.absmean /= scale


def output_loss(error: Tensor, gram: Tensor, exact: bool = False) -> Tensor:
    """error float32 [N, K] of a matrix: mean |error x|² a row, float32 [N].

    On a GPU the factors are rounded to TF32, whose 11 bits leave the sum of so many squares right
    to four digits and more; unless `exact`: where later columns made up for earlier ones, what is
    left is the small difference of large sums.
    """
    # H is its own transpose; so read, tensor cores have what they add over side by side.
    gram = gram.t() if error.is_cuda else gram
    with _tensor_float32() if error.is_cuda and not exact else nullcontext():
        return torch.cat([((part @ gram) * part).sum(1) for part in error.split(ROWS)])


@contextmanager
def _tensor_float32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before
