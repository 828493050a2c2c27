"""`import`: a model's .bin files become safetensors, in a child process with limits.

A .bin file is a pickle: a program that builds objects. torch's restricted reader
(`weights_only=True`) builds tensors and nothing else, and there is no other way here. It runs in a
process of its own all the same, which may take so much memory, time and disk space and no more,
is given none of this process's environment, and ends when it is done:

    python -m backend.import_bin SOURCE TARGET, the names of its files on standard input
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from backend.errors import UserError
from backend.workspace.new_folder import NewFolder

if TYPE_CHECKING:
    import torch  # at run time only in the child

BIN_INDEX = "pytorch_model.bin.index.json"
INDEX = "model.safetensors.index.json"
COPIED = (
    "config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.tiktoken", "chat_template*", "generation_config.json",
    "quantize_config.json", "LICENSE*", "NOTICE*",
)  # nothing that could run (.py)  # fmt: skip
MAX_INDEX_BYTES = 256 << 20
MAX_SHARDS = 10_000
EXTRA_MEMORY = 2 << 30  # address space beside the files that are mapped and the tensors
SECONDS_PER_GB = 60
PART_BYTES = 2 << 30  # of a file that is written
PROJECT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TZ", "LANG", "LC_ALL")
HINT = "Ask the model's publisher for safetensors; most offer them."


def import_model(model: str | Path, target: str | Path, *, overwrite: bool = False) -> list[str]:
    """Make a folder with safetensors of one with pytorch_model*.bin.

    Returns:
        Names of the weights' files in `target`.

    Raises:
        UserError: there are no .bin files, one is missing, holds anything but tensors, or is more
            than the limits allow; or the target exists or cannot be written.
    """
    source = Path(model)
    shards = bin_files(source)
    sizes = [(source / name).stat().st_size for name in shards]
    is_import = (lambda path: (path / "config.json").is_file()) if overwrite else None
    with NewFolder(target, source, sum(sizes), is_import, field="target") as partial:
        for path in sorted(source.iterdir()):
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in COPIED):
                shutil.copyfile(path, partial / path.name)
        _run_child(source, partial, shards, sizes)
    return sorted(path.name for path in Path(target).glob("*.safetensors"))


def bin_files(source: Path) -> list[str]:
    """Names of the files that hold a model's weights.

    Raises:
        UserError: there are none, or one is missing.
    """
    if not source.is_dir():
        raise UserError(f"There is no model folder {source}.", "Check the path.", field="model")
    if list(source.glob("model*.safetensors")):
        raise UserError(
            f"{source} has safetensors, so nothing need be imported.",
            "Name this folder wherever a model is named.",
            field="model",
        )
    index = source / BIN_INDEX
    names = {"pytorch_model.bin"}
    if index.exists():
        try:
            if not index.is_file() or index.stat().st_size > MAX_INDEX_BYTES:
                raise ValueError("not a regular file, or too large")
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if not 0 < len(names) <= MAX_SHARDS or any(
                not isinstance(name, str) or not name.endswith(".bin") or Path(name).name != name
                for name in names
            ):
                raise ValueError("it names no .bin files of this folder")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{index} is damaged: {error}.", "Download the model again.") from error
    for name in sorted(names):
        if not (source / name).is_file():
            raise UserError(
                f"{source} has no {name}.",
                "Download the model again." if index.exists() else
                "import is for folders with pytorch_model.bin, or parts of it with their index.",
                field="model",
            )
    return sorted(names)


def _run_child(source: Path, partial: Path, shards: list[str], sizes: list[int]) -> None:
    job = {"shards": shards, "memory": 3 * max(sizes) + EXTRA_MEMORY,
           "seconds": 120 + SECONDS_PER_GB * sum(sizes) // 10**9,
           "file_bytes": 2 * max(sizes) + (64 << 20)}  # fmt: skip
    paths = [str(path.resolve()) for path in (source, partial)]
    child = subprocess.run(
        [sys.executable, "-m", "backend.import_bin", *paths],
        cwd=PROJECT,
        env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode == 0:
        return
    try:
        error = json.loads(child.stdout.splitlines()[-1])
        raise UserError(error["message"], error["hint"], field="model")
    except (IndexError, ValueError, KeyError, TypeError):
        ended = f"signal {-child.returncode}" if child.returncode < 0 else "an error"
        last = child.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise UserError(
            f"The process that read {source} ended with {ended}: {last[0]:.200}.",
            f"The files are damaged, or need more than the limits allow. {HINT}",
            field="model",
        ) from None


def main() -> None:
    """The child: limits first, then one file after another."""
    source, target = map(Path, sys.argv[1:])
    job = json.loads(sys.stdin.read())
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    save_file({"warm": torch.zeros(1)}, target / ".warm")  # imports what it needs before the limits
    (target / ".warm").unlink()
    _limit(job["memory"], job["seconds"], job["file_bytes"])
    places: dict[str, int] = {}  # tensor -> number of its file, from 1
    total = files = 0
    try:
        for name in job["shards"]:
            tensors = read_tensors(source / name)
            if twice := places.keys() & tensors:
                text = f"{name} holds {min(twice):.200}, which another file has, too."
                raise UserError(text, HINT)
            for part in parts_of(tensors):
                files += 1
                save_file(part, target / f"part-{files}", metadata={"format": "pt"})
                os.chmod(target / f"part-{files}", 0o644)
                places |= dict.fromkeys(part, files)
                total += sum(tensor.nbytes for tensor in part.values())
        names = {n: f"model-{n:05d}-of-{files:05d}.safetensors" for n in range(1, files + 1)}
        if files == 1:
            names = {1: "model.safetensors"}
        for number, final in names.items():
            os.replace(target / f"part-{number}", target / final)
        if files > 1:
            weight_map = {tensor: names[number] for tensor, number in sorted(places.items())}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (target / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    except UserError as error:
        print(json.dumps({"message": error.message, "hint": error.hint}))
        sys.exit(1)


def _limit(memory: int, seconds: int, file_bytes: int) -> None:
    """Bound address space, CPU time and file sizes from now on; no further processes."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def parts_of(
    tensors: dict[str, torch.Tensor],
) -> Iterator[dict[str, torch.Tensor]]:
    """In runs of PART_BYTES at most, or of one tensor: writing one takes as much memory."""
    part: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > PART_BYTES:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    yield part


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor; none shares memory with another.

    Raises:
        UserError: the file holds anything else, or is of a format before torch 1.6.
    """
    import torch

    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # pickles can fail in any way
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"{path.name} is refused: it is damaged, in the format of torch before 1.6, or holds "
            f"more than tensors ({reason}).",
            HINT,
        ) from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path.name} holds no tensors by name.", HINT)
    tensors: dict[str, torch.Tensor] = {}
    seen = set()
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            kind = type(tensor).__name__
            raise UserError(f"{path.name} holds {name!r:.80}, which is a {kind}, no tensor.", HINT)
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise UserError(f"{path.name} holds {name:.80} in a form that is not supported.", HINT)
        own = tensor.detach().contiguous()
        place = own.untyped_storage().data_ptr()
        tensors[name] = own.clone() if place in seen else own  # safetensors shares no memory
        seen.add(place)
    return tensors


if __name__ == "__main__":
    main()
