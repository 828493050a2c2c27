"""What a model does with texts longer than it was trained for, where a setting says so."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from backend.errors import UserError
from backend.layers.rotary import QWEN_DYNAMIC
from backend.models.model_config import ModelConfig

log = logging.getLogger(__name__)
FARTHEST = 4  # trained lengths: what dynamic NTK has been seen to bridge (docs/long_context.md)

@dataclass(frozen=True)
class LongContext:
    """What a model does beyond the length that it was trained for; None: what its config.json says.

    Attributes:
        rope_scaling_factor: from 1 on, dynamic NTK with this factor (Qwen's own formula has none);
            below, none.
        use_logn_attn: see `ModelConfig`.
    """

    rope_scaling_factor: float | None = None
    use_logn_attn: bool | None = None

    @classmethod
    def declared(cls, config: ModelConfig) -> LongContext:
        """What a config.json says, with a 0 for no dynamic NTK; Qwen's own formula is a 1."""
        rope = config.rope
        factor = {"dynamic": rope.factor, QWEN_DYNAMIC: 1.0}.get(rope.rope_type, 0.0)
        return cls(factor, config.use_logn_attn)

    def applied(self, config: ModelConfig) -> ModelConfig:
        """`config` with what is said here.

        Raises:
            UserError: dynamic NTK is asked of a model that stretches its positions another way.
        """
        rope, factor, logn = config.rope, self.rope_scaling_factor, self.use_logn_attn
        is_dynamic = rope.rope_type in ("dynamic", QWEN_DYNAMIC)
        if factor is not None and factor >= 1:
            if not is_dynamic and rope.rope_type != "default":
                raise UserError(
                    f"The model stretches its positions already: config.json has the rope type "
                    f"{rope.rope_type}, which dynamic NTK cannot be added to.",
                    "Leave rope_scaling_factor out, or set it to 0.",
                    field="rope_scaling_factor",
                )
            rope = replace(rope, rope_type=config.dynamic_ntk, factor=factor)
        elif factor is not None and is_dynamic:
            rope = replace(rope, rope_type="default", factor=None)
        if logn is None:
            logn = config.use_logn_attn
        return replace(config, rope=rope, use_logn_attn=logn)


def warn_of_length(config: ModelConfig, session_len: int) -> None:
    """Say so if conversations may become longer than the model can follow them."""
    trained = config.max_position_embeddings
    if session_len <= trained:
        return
    if config.rope.rope_type not in ("dynamic", QWEN_DYNAMIC):
        log.warning(
            "A conversation may have %d tokens, but the model was trained for %d: beyond them it "
            "is likely to write nonsense. `rope_scaling_factor` 1.0 stretches its positions.",
            session_len, trained,
        )  # fmt: skip
    elif session_len > FARTHEST * trained:
        log.warning(
            "A conversation may have %d tokens, %.0f times as many as the model was trained for: "
            "more than dynamic NTK bridges well.",
            session_len, session_len / trained,
        )  # fmt: skip
