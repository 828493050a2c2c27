"""`convert`: a model in Hugging Face layout becomes a workspace, one layer at a time.

While a layer is read, those before it go to the disk and are hashed; memory holds these few. All is
written to NAME.partial, which gets its name last.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from json import dumps
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from backend.chat_formats import template_choice
from backend.chat_template import ChatTemplate
from backend.errors import UserError
from backend.layers.embedding import VocabParallelEmbedding
from backend.layers.linear import BuildContext, LinearLayer
from backend.layers.linear_method import WeightSlot
from backend.layers.norm import RMSNorm
from backend.layers.parallel import ParallelContext
from backend.models.checkpoint import DOWNLOAD_AGAIN, TensorInfo, read_tensor
from backend.models.decoder import DecoderLayer
from backend.models.loader import check_model, create_shell, is_finite, linear_method
from backend.models.long_context import LongContext
from backend.models.model_config import ModelConfig, QuantizationConfig
from backend.models.registry import read_config_fields
from backend.models.workspace_weights import pack_scales_zeros, stored_name, workspace_slots
from backend.tokenizer import Tokenizer
from backend.workspace.keys import KEYS
from backend.workspace.layout import (
    CONFIG_INI,
    TOKENIZER,
    WEIGHTS,
    FileRecord,
    Manifest,
    record,
    workspace_of,
)
from backend.workspace.new_folder import NewFolder

NAME = re.compile(r"[\w.:/+-]+")
INDEX = "model.safetensors.index.json"
WRITERS = 3  # threads that write and hash files
WAITING_BYTES = 2 << 30  # of tensors that wait for them; one layer may be more
# What is copied; nothing that could run (.py).
VOCABULARY = (
    "tokenizer.json", "tokenizer.model", "*.tiktoken", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
TOKENIZER_FILES = (
    *VOCABULARY, "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*",
)  # fmt: skip
COPIED = (*TOKENIZER_FILES, "generation_config.json", "LICENSE*", "NOTICE*")
WEIGHT_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float32}
BYTES = {"F64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Source:
    """A checked model, as one rank after another will read it."""

    folder: Path
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]  # by the decoder's names
    dtype: torch.dtype  # of what has no format of its own

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(prod(t.shape) * BYTES.get(t.dtype, 4) for t in self.tensors.values())


def convert(
    name: str,
    model: str | Path,
    target: str | Path = "workspace",
    *,
    tp: int = 1,
    model_format: str | None = None,
    group_size: int = 0,
    tokenizer_path: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Make a workspace of a model.

    Args:
        name: of the model; one of the chat templates' names chooses that template.
        model: folder in Hugging Face layout.
        target: the workspace's folder, which must not exist.
        tp: ranks to part the weights for.
        model_format: "hf" for weights of 16 bits, "awq" for 4; None takes what the model says.
        group_size: of "awq", if the model does not say it; 0 is not given.
        tokenizer_path: folder or file of a tokenizer that takes the place of the model's.
        overwrite: replace a workspace that is there, once the new one is complete.

    Returns:
        The workspace's folder.

    Raises:
        UserError: the model is missing, damaged, not supported or not what `model_format` says;
            `tp` does not divide it; or the target exists, or cannot be written.
    """
    if NAME.fullmatch(name) is None:
        raise UserError(
            f"{name!r:.80} is no name for a model.",
            "Use letters, digits and . _ - + : / only.",
            field="name",
        )
    folder = Path(model)
    if workspace_of(folder) is not None:
        raise UserError(f"{folder} is a workspace already.", "Name the model that it is made of.")
    source = _check_source(folder, tp, model_format, group_size)
    tokenizer_files = _tokenizer_files(folder, tokenizer_path)
    is_workspace = (lambda path: workspace_of(path) is not None) if overwrite else None
    with NewFolder(target, folder, source.size, is_workspace) as partial:
        (partial / WEIGHTS).mkdir(parents=True)
        (partial / TOKENIZER).mkdir()
        for path in tokenizer_files:
            shutil.copyfile(path, partial / TOKENIZER / path.name)
        (partial / TOKENIZER / "config.json").write_text(_config_json(source), encoding="utf-8")
        _check_template(name, partial / TOKENIZER)
        locked = _locked(name, source, tp, Tokenizer.from_folder(partial / TOKENIZER))
        files = _write_weights(source, partial, tp, progress)
        names = [f"{TOKENIZER}/{entry.name}" for entry in (partial / TOKENIZER).iterdir()]
        files |= record(partial, names)
        (partial / CONFIG_INI).write_text(
            _config_ini(locked, LongContext.declared(source.config)), encoding="utf-8"
        )
        Manifest(tp, locked["weight_type"], locked, files).write(partial)
    return Path(os.path.abspath(target))


def _check_source(folder: Path, tp: int, model_format: str | None, group_size: int) -> Source:
    for rank in range(tp):
        config, tensors = check_model(str(folder), ParallelContext(rank, tp))
    check_format(folder, config.quantization, model_format, group_size)
    formats = {
        FLOATS[info.dtype] for name, info in tensors.items()
        if info.dtype in FLOATS and not name.endswith((".scales", ".scale"))
    }  # fmt: skip
    dtype = formats.pop() if len(formats) == 1 else torch.float32  # the one that holds them all
    return Source(folder, config, tensors, dtype)


def check_format(
    folder: str | Path,
    quantization: QuantizationConfig | None,
    model_format: str | None,
    group_size: int,
) -> None:
    """Compare what a user says of a model's weights with what its files say.

    Args:
        quantization: by its files.
        model_format: "hf" or "awq"; None is not given.
        group_size: 0 is not given.

    Raises:
        UserError: they disagree.
    """
    is_awq = quantization is not None and quantization.method == "awq"
    if model_format is not None and (model_format == "awq") != is_awq:
        found = "4-bit AWQ weights" if is_awq else "no 4-bit weights"
        raise UserError(
            f"{folder} has {found}, which is not --model-format {model_format}.",
            "Leave --model-format out: the model's files tell it.",
            field="model_format",
        )
    own = quantization.group_size if quantization is not None else 0
    if group_size not in (0, own):
        raise UserError(
            f"{folder} is quantized in groups of {own}, not of {group_size}."
            if is_awq else f"{folder} is not quantized in groups, so it has no group size.",
            "Leave --group-size out: the model's files tell it.",
            field="group_size",
        )


def _tokenizer_files(folder: Path, tokenizer_path: str | Path | None) -> list[Path]:
    """What is copied beside config.json. A tokenizer given instead is not mixed with the model's:
    of a folder all is taken, a file takes the place of the model's vocabulary."""
    own = _matching(folder, COPIED)
    if tokenizer_path is None:
        return own
    given = Path(tokenizer_path)
    if not given.exists():
        raise UserError(f"There is no tokenizer at {given}.", field="tokenizer_path")
    files = [given] if given.is_file() else _matching(given, COPIED)
    replaced = VOCABULARY if given.is_file() else TOKENIZER_FILES
    kept = set(own) - set(_matching(folder, replaced))
    return files + sorted(path for path in kept if path.name not in {f.name for f in files})


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted(
        path for path in folder.iterdir()
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in patterns)
    )  # fmt: skip


def _check_template(name: str, folder: Path) -> None:
    """Warn if the model could not chat: NAME chooses no template, and it brings none."""
    if ChatTemplate.from_folder(folder, template_choice("", name)).source is None:
        log.warning(
            "%s is no chat template's name, and the model has no template of its own: it can "
            "complete text, but not chat. `--chat-template` chooses one when it is served.", name
        )


def _config_json(source: Source) -> str:
    """The model's, with what of it only its tensors said."""
    raw = dict(read_config_fields(str(source.folder)).raw)
    quantization = source.config.quantization
    if quantization is not None and not raw.get("quantization_config"):
        forms: dict[str, dict[str, Any]] = {
            "awq": {"bits": 4, "group_size": quantization.group_size, "zero_point": True,
                    "version": "gemm"},
            "smooth_quant": {"quant_dtype": "int8"},
        }  # fmt: skip
        raw["quantization_config"] = {
            "quant_method": quantization.method,
            **forms[quantization.method],
            "modules_to_not_convert": list(quantization.not_converted) or None,
        }
    raw.pop("auto_map", None)  # it names .py files, which are not there
    return dumps(raw, indent=2, ensure_ascii=False) + "\n"


def _locked(name: str, source: Source, tp: int, tokenizer: Tokenizer) -> dict[str, str]:
    """config.ini's values that the weights decide."""
    config = source.config
    quantization = config.quantization
    bits = {"awq": "int4", "smooth_quant": "int8"}
    start = tokenizer.bos_token_id
    values: dict[str, Any] = {
        "model_name": name,
        "tensor_para_size": tp,
        "head_num": config.num_heads,
        "kv_head_num": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "num_layer": config.num_layers,
        "inter_size": config.intermediate_size,
        "norm_eps": config.rms_norm_eps,
        "attn_bias": int(config.qkv_bias),
        "start_id": -1 if start is None else start,
        "end_id": next(iter(tokenizer.eos_token_ids), -1),
        "weight_type": bits[quantization.method] if quantization else WEIGHT_TYPES[source.dtype],
        "rotary_embedding": config.head_dim,
        "rope_theta": config.rope.rope_theta,
        "size_per_head": config.head_dim,
        "group_size": quantization.group_size if quantization else 0,
        "max_position_embeddings": config.max_position_embeddings,
    }
    return {key: str(value) for key, value in values.items()}


def _config_ini(locked: Mapping[str, str], long_context: LongContext) -> str:
    """All keys in LMDeploy's order: what the weights decide, and every setting's default."""
    values = {
        **locked,
        "session_len": locked["max_position_embeddings"],
        "rope_scaling_factor": long_context.rope_scaling_factor,
        "use_logn_attn": int(bool(long_context.use_logn_attn)),
    }
    lines = [f"{key.name} = {values.get(key.name, key.default)}" for key in KEYS.values()]
    return "\n".join(["[llama]", *lines, ""])


def _write_weights(
    source: Source, partial: Path, tp: int, progress: Progress
) -> dict[str, FileRecord]:
    """All tensors, a file a layer, and the index; records of the files by their paths."""
    files: dict[str, FileRecord] = {}
    places: dict[str, str] = {}
    done, total = 0, source.size
    pending: deque[tuple[int, Future[dict[str, FileRecord]]]] = deque()
    with ThreadPoolExecutor(WRITERS) as writers:
        for stem, tensors in _shards(source, tp):
            shard = f"{stem}.safetensors"
            places |= dict.fromkeys(tensors, shard)
            size = sum(tensor.nbytes for tensor in tensors.values())
            while pending and size + sum(waiting for waiting, _ in pending) > WAITING_BYTES:
                files |= pending.popleft()[1].result()
            pending.append((size, writers.submit(_write_shard, partial, shard, tensors)))
            del tensors
            done += size
            progress(min(done, total), total)
        for _, written in pending:
            files |= written.result()
    index = {"metadata": {"total_size": done}, "weight_map": dict(sorted(places.items()))}
    (partial / WEIGHTS / INDEX).write_text(dumps(index, indent=1) + "\n", encoding="utf-8")
    return files | record(partial, [f"{WEIGHTS}/{INDEX}"])


def _write_shard(partial: Path, shard: str, tensors: dict[str, Tensor]) -> dict[str, FileRecord]:
    path = partial / WEIGHTS / shard
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(None, str(error), str(path)) from error
    os.chmod(path, 0o644)  # safetensors lets nobody but its owner read a file
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return record(partial, [f"{WEIGHTS}/{shard}"])


def _shards(source: Source, tp: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name of the file, its tensors), each made when it is asked for."""
    for path, module in create_shell(source.config, ParallelContext()).named_modules():
        if not path.startswith("layers.") and isinstance(module, (VocabParallelEmbedding, RMSNorm)):
            own = stored_name(path)
            weight = module.weight.new_empty(module.weight.shape, dtype=source.dtype, device="cpu")
            ((name, slot),) = module.weight_slots().items()
            _fill(source, {name: replace(slot, destination=weight)})
            yield own, {f"{own}.weight": weight}
    for index in range(source.config.num_layers):
        tensors: dict[str, Tensor] = {}
        for rank in range(tp):
            tensors |= _layer_of_rank(source, index, ParallelContext(rank, tp))
        yield f"layers.{index}", tensors


def _layer_of_rank(source: Source, index: int, parallel: ParallelContext) -> dict[str, Tensor]:
    method = linear_method(source.config, source.dtype, torch.device("meta"))
    context = BuildContext(source.dtype, torch.device("cpu"), parallel, method)
    layer = DecoderLayer(source.config, index, context)
    slots: dict[str, WeightSlot] = {}
    for module in layer.modules():
        if isinstance(module, (LinearLayer, RMSNorm)):
            slots |= module.weight_slots()
    _fill(source, slots)
    prefix = f"layers.{index}."
    stored = workspace_slots(layer, parallel.rank, prefix)
    pack_scales_zeros(layer, parallel.rank, stored, prefix)
    return {name: slot.destination for name, slot in stored.items()}


def _fill(source: Source, slots: Mapping[str, WeightSlot]) -> None:
    """Read the model's tensors, by the decoder's names, to where the slots say."""
    by_file = defaultdict(list)
    for name in slots:
        by_file[source.tensors[name].path].append(name)
    for path, names in by_file.items():
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in names:
                    slot = slots[name]
                    part = read_tensor(file, source.tensors[name], slot.source)
                    if part.is_floating_point() and not is_finite(part):
                        raise UserError(
                            f"{source.tensors[name].name} contains NaN or infinity.",
                            f"The weights are damaged. {DOWNLOAD_AGAIN}",
                        )
                    slot.destination.copy_(part)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}.", DOWNLOAD_AGAIN) from error
