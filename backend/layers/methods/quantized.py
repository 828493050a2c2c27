"""What formats of fewer bits have in common: some modules may have been kept in 16 bit."""

from __future__ import annotations

from collections.abc import Sequence

from backend.errors import UserError
from backend.layers.linear_method import LinearMethod
from backend.layers.methods.unquantized import UnquantizedMethod


class QuantizedMethod(LinearMethod):
    """A weight format that a checkpoint need not have for every layer.

    Args:
        not_converted: `modules_to_not_convert` of config.json, each named by one or more
            neighbouring components of its path: "self_attn", "layers.0.mlp.down_proj".
    """

    def __init__(self, not_converted: Sequence[str] = ()) -> None:
        self.not_converted = tuple(not_converted)
        self.unquantized = UnquantizedMethod()

    def for_layer(self, names: Sequence[str]) -> LinearMethod:
        kept = [name for name in names if self._is_kept(name)]
        if kept and len(kept) < len(names):
            other = next(name for name in names if name not in kept)
            raise UserError(
                f"modules_to_not_convert in config.json names {kept[0]} but not {other}; the two "
                "are one product here and must be stored alike.",
                "Quantize the model again with both or neither of them.",
            )
        return self.unquantized if kept else self

    def _is_kept(self, name: str) -> bool:
        return any(f".{entry.strip('.')}." in f".{name}." for entry in self.not_converted)
