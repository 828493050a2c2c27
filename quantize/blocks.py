"""A checkpoint one decoder block at a time, so that memory holds one block however many there are.

The blocks are the product's own DecoderLayers: what is observed here is what will be served.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from backend.errors import UserError
from backend.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from backend.layers.linear import BuildContext, LinearLayer
from backend.layers.linear_method import LinearMethod, LinearWeight, WeightSlot
from backend.layers.norm import RMSNorm
from backend.layers.parallel import ParallelContext
from backend.layers.rotary import RotaryEmbedding
from backend.models.checkpoint import DOWNLOAD_AGAIN, read_tensor
from backend.models.decoder import DecoderLayer
from backend.models.loader import check_dtype, check_model, is_finite, linear_method
from kernels.ops import AttentionMetadata, KVCache
from quantize.hidden_store import HiddenStore, in_batches

BLOCK_SIZE = 64  # KV slots; each sequence begins at a multiple of it


class BlockModel:
    """Embedding, decoder blocks and head of a checkpoint, each loaded when it is asked for.

    Args:
        folder: config.json and safetensors files.
        device: where blocks are loaded and run.
        dtype: of weights and activations: float32, bfloat16 or float16.
        session_len: longest sequence that will be run (some rope scalings depend on it); by
            default what the model was trained for.

    Attributes:
        config: ModelConfig.
        num_blocks: decoder layers.

    Raises:
        UserError: naming what is missing, damaged or unsupported in the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        session_len: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.device = device
        self.dtype = dtype
        parallel = ParallelContext()
        self.config, self._tensors = check_model(str(folder), parallel, session_len)
        check_dtype(self.config, dtype, device)
        self.num_blocks = self.config.num_layers
        method = linear_method(self.config, dtype, device)
        self._context = BuildContext(dtype, device, parallel, method)
        self._rotary = RotaryEmbedding(
            self.config.rope,
            self.config.head_dim,
            self.config.max_position_embeddings,
            session_len or self.config.max_position_embeddings,
            device,
            dtype if self.config.use_logn_attn else None,
        )
        self._last: tuple[KVCache, Tensor] | None = None

    def load_block(self, index: int) -> DecoderLayer:
        """Decoder layer `index`, from 0.

        Weights of a 16-bit checkpoint stay plain [out_features, in_features] parameters in
        `dtype`; those of a quantized one are made ready to run, as when served.

        Raises:
            UserError: a file cannot be read, or a weight is NaN or infinite.
        """
        with torch.no_grad():
            block = DecoderLayer(self.config, index, self._context)
            self._fill(block)
            if self.config.quantization is not None:
                for layer in linears(block).values():
                    layer.process_weights_after_loading()
        return block

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """ids int64 [B, S] on any device -> hidden states before the first block [B, S, H]."""
        return self._table(ids.to(self.device))

    @torch.no_grad()
    def run(
        self, block: DecoderLayer, hidden: Tensor, lengths: Tensor | None = None
    ) -> Tensor:
        """hidden [B, S, H] -> what the next block gets, [B, S, H]; `hidden` is left as it is.

        Causal attention within each of the B sequences, from position 0.

        Args:
            lengths: int64 [B], how many tokens a sequence really has, where it is filled up to S:
                a rotation may depend on that. None: S.
        """
        batch, length, size = hidden.shape
        # A copy, because a kernel may write the sum with the residual over the residual.
        flat = hidden.reshape(-1, size).to(self.device, copy=True)
        metadata = contiguous_metadata(batch, length, self.device)
        slots = batch * padded(length)
        shape = (block.self_attn.num_kv_heads, slots, self.config.head_dim)
        cache = KVCache(flat.new_empty(shape), flat.new_empty(shape))
        positions = torch.arange(length, device=self.device).repeat(batch)
        own = [length] * batch if lengths is None else lengths.tolist()
        steps = torch.tensor([self._rotary.step_of(n) for n in own], device=self.device)
        rotation = self._rotary(positions, steps.repeat_interleave(length))
        output, residual = block(flat, None, rotation, cache, metadata)
        self._last = cache, residual.view(hidden.shape)
        return (output + residual).view(hidden.shape)

    def kv(self) -> tuple[Tensor, Tensor]:
        """K (after the rotation) and V of the last `run`, [B, S, K, D] each: views."""
        cache, residual = self._last_run()
        batch, length, _ = residual.shape
        k, v = (
            pool.unflatten(1, (batch, -1))[:, :, :length].permute(1, 2, 0, 3)
            for pool in (cache.k, cache.v)
        )
        return k, v

    def attended(self) -> Tensor:
        """The last `run`'s input plus its attention, [B, S, H]: what the second norm reads."""
        return self._last_run()[1]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """What the last block gave, [..., H] -> float32 logits [..., vocab_size]."""
        norm, head = self._head
        flat = norm(hidden.reshape(-1, hidden.shape[-1]).to(self.device))
        return head(flat).unflatten(0, hidden.shape[:-1])

    def _last_run(self) -> tuple[KVCache, Tensor]:
        if self._last is None:
            raise RuntimeError("no block was run yet")
        return self._last

    @cached_property
    def _table(self) -> VocabParallelEmbedding:
        return self._new_table("model.embed_tokens")

    @cached_property
    def _head(self) -> tuple[RMSNorm, ParallelLMHead]:
        config = self.config
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps, "model.norm", self._context)
        self._fill(norm)
        table = self._table if config.tie_word_embeddings else self._new_table("lm_head")
        head = ParallelLMHead(table, self._context, config.normalized_head)
        head.process_weights_after_loading()
        return norm, head

    def _new_table(self, name: str) -> VocabParallelEmbedding:
        config = self.config
        with torch.no_grad():
            table = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, name, self._context
            )
            self._fill(table)
        return table

    def _fill(self, module: nn.Module) -> None:
        """Read a module's weights from the files that hold them."""
        slots: dict[str, WeightSlot] = {}
        for part in module.modules():
            if isinstance(part, (LinearLayer, RMSNorm, VocabParallelEmbedding)):
                slots.update(part.weight_slots())
        by_file = defaultdict(list)
        for name in slots:
            by_file[self._tensors[name].path].append(name)
        for path, names in by_file.items():
            try:
                with torch.no_grad(), safe_open(path, framework="pt", device="cpu") as file:
                    for name in names:
                        slots[name].destination.copy_(read_tensor(file, self._tensors[name]))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read: {error}.", DOWNLOAD_AGAIN) from error
        for name, slot in slots.items():
            if slot.destination.is_floating_point() and not is_finite(slot.destination):
                raise UserError(
                    f"{name} contains NaN or infinity in {str(self.dtype)[len('torch.'):]}.",
                    f"Use --dtype float32 or bfloat16; if that does not help, the weights are "
                    f"damaged. {DOWNLOAD_AGAIN}",
                )


def linears(block: DecoderLayer) -> dict[str, LinearLayer]:
    """A block's linear layers by their names in it, such as "self_attn.qkv_proj"."""
    return {
        name: module for name, module in block.named_modules() if isinstance(module, LinearLayer)
    }


def padded(length: int) -> int:
    """KV slots of one sequence: whole blocks."""
    return -(-length // BLOCK_SIZE) * BLOCK_SIZE


def contiguous_metadata(batch: int, length: int, device: torch.device) -> AttentionMetadata:
    """`batch` sequences of `length` new tokens, one after another in a pool of whole blocks."""
    blocks = padded(length) // BLOCK_SIZE
    starts = torch.arange(batch, device=device) * padded(length)
    slots = starts[:, None] + torch.arange(length, device=device)
    table = torch.arange(batch * blocks, dtype=torch.int32, device=device).view(batch, blocks)
    decoding = length == 1
    return AttentionMetadata(
        slot_mapping=slots.flatten(),
        block_table=table,
        cu_seqlens_q=torch.arange(batch + 1, dtype=torch.int32, device=device) * length,
        seq_lens_k=torch.full((batch,), length, dtype=torch.int32, device=device),
        query_lens=[length] * batch,
        seq_lens=[length] * batch,
        kv_runs=[[(index * padded(length), length)] for index in range(batch)],
        block_size=BLOCK_SIZE,
        num_decodes=batch if decoding else 0,
        max_query_len=0 if decoding else length,
        max_seq_len=length,
    )


InputObserver = Callable[[str, Tensor], None]  # name in the block, input [T, in_features]


@contextmanager
def observed_inputs(block: DecoderLayer, observer: InputObserver) -> Iterator[None]:
    """While entered, `observer` is told the input of every linear of `block` before its product.

    A module's hooks would miss some: `gate_up_proj` is called by `gated`, not by `forward`.
    """
    layers = linears(block)
    methods = {name: layer.method for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.method = _ObservedMethod(methods[name], name, observer)
        yield
    finally:
        for name, layer in layers.items():
            layer.method = methods[name]


class _ObservedMethod(LinearMethod):
    """A layer's own method, which tells its input first."""

    def __init__(self, method: LinearMethod, name: str, observer: InputObserver) -> None:
        self.method = method
        self.name = name
        self.observer = observer

    def create_weights(
        self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, LinearWeight]:
        return self.method.create_weights(in_features, out_features, dtype, device)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.method.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        self.observer(self.name, x)
        return self.method.apply(layer, x, bias)

    def apply_gated(self, layer: nn.Module, x: Tensor) -> Tensor:
        self.observer(self.name, x)
        return self.method.apply_gated(layer, x)


def propagate(
    model: BlockModel, block: DecoderLayer, hidden: HiddenStore, size: int,
    note: Callable[[str], None], lengths: Tensor | None = None,
) -> int:
    """`hidden` becomes what the next block gets, `size` samples at a time; see `in_batches`.

    `lengths` as in `BlockModel.run`, of all samples.
    """

    def work(batch: slice) -> None:
        own = None if lengths is None else lengths[batch]
        hidden[batch] = model.run(block, hidden[batch].to(model.device), own)

    return in_batches(len(hidden), size, work, note)
