"""Where things lie in a workspace, and whether they are what its manifest says.

    NAME/manifest.json                              SHA-256 of all files that nobody edits
    NAME/triton_models/tokenizer/                   config.json, tokenizer, chat template
    NAME/triton_models/weights/config.ini           settings; users edit it
    NAME/triton_models/weights/*.safetensors        the weights of all ranks, a file a layer
    NAME/triton_models/weights/layers.N.past_kv_scale.R.weight    if `lite kv_qparams` was run

All paths are relative, so that a workspace can be moved. Standard library only: every floor reads
workspaces.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from backend.errors import UserError

TOKENIZER = "triton_models/tokenizer"
WEIGHTS = "triton_models/weights"
CONFIG_INI = f"{WEIGHTS}/config.ini"
MANIFEST = "manifest.json"
STAMP = f"{WEIGHTS}/.verified"
VERSION = 1
MAX_MANIFEST_BYTES = 64 << 20
CONVERT_AGAIN = "Make the workspace again with: python app.py convert NAME MODEL"


def workspace_of(model: str | os.PathLike[str]) -> Path | None:
    """The workspace that `model` names, itself or by its triton_models or weights folder.

    None if it is no workspace, such as a folder in Hugging Face layout.
    """
    path = Path(os.path.abspath(model))
    for root, inner in (
        (path, ""),
        (path.parent, "triton_models"),
        (path.parent.parent, WEIGHTS),
    ):
        whole = (root / MANIFEST).is_file() and (root / WEIGHTS).is_dir()
        if root / inner == path and (whole or (root / CONFIG_INI).is_file()):
            return root
    return None


def text_folder(model: str | os.PathLike[str]) -> Path:
    """Where a model's config.json, tokenizer and chat template are."""
    root = workspace_of(model)
    return Path(model) if root is None else root / TOKENIZER


def weights_folder(model: str | os.PathLike[str]) -> Path:
    """Where a model's safetensors are."""
    root = workspace_of(model)
    return Path(model) if root is None else root / WEIGHTS


def tensor_para_size(model: str | os.PathLike[str]) -> int:
    """Ranks that a model's weights are parted for: 1 unless it is a workspace made for more."""
    root = workspace_of(model)
    return 1 if root is None else read_manifest(root).tensor_para_size


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of a file."""

    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a workspace was made as.

    Attributes:
        tensor_para_size: ranks that its weights are parted for.
        weight_type: fp16, bf16, fp32, int4 or int8.
        locked: config.ini's keys that the weights decide, and their values.
        files: path in the workspace -> record.
    """

    tensor_para_size: int
    weight_type: str
    locked: dict[str, str]
    files: dict[str, FileRecord]

    def write(self, root: Path) -> None:
        """Write it into the workspace `root`."""
        content = {
            "version": VERSION,
            "tensor_para_size": self.tensor_para_size,
            "weight_type": self.weight_type,
            "locked": self.locked,
            "files": {
                path: {"bytes": record.size, "sha256": record.sha256}
                for path, record in sorted(self.files.items())
            },
        }
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (root / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(root: Path) -> Manifest:
    """The manifest of the workspace `root`.

    Raises:
        UserError: it is missing, as in LMDeploy's own workspaces, or damaged.
    """
    path = root / MANIFEST
    if not path.is_file():
        raise UserError(
            f"The workspace {root} has no {MANIFEST}; one of LMDeploy's own cannot be read.",
            CONVERT_AGAIN,
            field="model",
        )
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError("too large")
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["version"] != VERSION:
            raise ValueError(f"version {raw['version']!r:.20}")
        files = {_safe(name): _record(entry) for name, entry in raw["files"].items()}
        locked = {str(key): str(value) for key, value in raw["locked"].items()}
        ranks = raw["tensor_para_size"]
        if type(ranks) is not int or not 1 <= ranks <= 1024:
            raise ValueError(f"tensor_para_size {ranks!r:.20}")
        return Manifest(ranks, str(raw["weight_type"]), locked, files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}.", CONVERT_AGAIN, field="model") from error


def _safe(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
        raise ValueError(f"the path {name!r:.80}")
    return name


def _record(entry: Any) -> FileRecord:
    size, digest = entry["bytes"], entry["sha256"]
    if type(size) is not int or not isinstance(digest, str) or len(digest) != 64:
        raise ValueError(f"the record {entry!r:.80}")
    return FileRecord(size, digest)


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record(root: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Records of files by their paths in `root`."""
    return {name: FileRecord((root / name).stat().st_size, sha256(root / name)) for name in names}


def verify(root: Path, *, weights: bool = True, again: bool = False) -> int:
    """Compare a workspace's files with its manifest.

    Sizes always. Hashes of files that are as they were when this was last found right, by size,
    inode and times of change, are not computed again: `STAMP` keeps that. A workspace that was
    moved to another disk is thus read in full once; one that cannot be written to, each time.

    Args:
        weights: the weights' files too, beside the tokenizer's.
        again: compute all hashes.

    Returns:
        How many files were hashed.

    Raises:
        UserError: naming the first file that is missing, added or another.
    """
    manifest = read_manifest(root)
    names = [name for name in manifest.files if weights or not name.startswith(WEIGHTS)]
    states = {name: _state(root, name, manifest.files[name]) for name in names}
    _refuse_additions(root, manifest)
    stamped = {} if again else _read_stamp(root)
    known = {name: state for name, state in stamped.items() if states.get(name) == state}
    changed = [name for name in names if name not in known]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib lets go of the GIL
        for name, digest in zip(changed, pool.map(lambda name: sha256(root / name), changed)):
            if digest != manifest.files[name].sha256:
                raise _disagrees(root, name, "its contents are not those that convert wrote")
    if weights and changed:
        _write_stamp(root, states)
    return len(changed)


def _state(root: Path, name: str, expected: FileRecord) -> list[int]:
    """What changes when a file does."""
    path = root / name
    try:
        status = os.stat(path)
    except OSError:
        raise _disagrees(root, name, "it is missing") from None
    if not path.is_file() or status.st_size != expected.size:
        what = f"it has {status.st_size} bytes and should have {expected.size}"
        raise _disagrees(root, name, what)
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _refuse_additions(root: Path, manifest: Manifest) -> None:
    """A file that was put beside the tokenizer could change what the model is told."""
    for name in sorted(os.listdir(root / TOKENIZER)):
        path = f"{TOKENIZER}/{name}"
        if path not in manifest.files and not name.startswith(".") and (root / path).is_file():
            raise _disagrees(root, path, "convert did not write it", "Take it away.")


def _disagrees(root: Path, name: str, why: str, hint: str = "") -> UserError:
    return UserError(
        f"{name} in {root} does not agree with {MANIFEST}: {why}.",
        hint or f"Copy the workspace again. {CONVERT_AGAIN}",
        field="model",
    )


def _read_stamp(root: Path) -> dict[str, list[int]]:
    """Of the present manifest; empty if there is none."""
    try:
        stamp = json.loads((root / STAMP).read_text(encoding="utf-8"))
        return dict(stamp["files"]) if stamp["manifest"] == sha256(root / MANIFEST) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write_stamp(root: Path, states: dict[str, list[int]]) -> None:
    content = {"manifest": sha256(root / MANIFEST), "files": states}
    draft = root / f"{STAMP}.{os.getpid()}"
    try:
        draft.write_text(json.dumps(content), encoding="utf-8")
        os.replace(draft, root / STAMP)
    except OSError:  # read-only: then it is read in full each time
        draft.unlink(missing_ok=True)
