"""What a download will do, before it does it: files, bytes, disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from backend.errors import UserError
from backend.hub.connection import Connection
from backend.hub.errors import HubError
from backend.hub.library import Entry, Manifest, draft_of, target_of
from backend.hub.names import (
    checked_id,
    checked_path,
    checked_revision,
    default_endpoint,
    default_source,
    default_token,
)
from backend.hub.patience import Patience
from backend.hub.sources import PROTOCOLS, HubFile, Listing, Source

# What the engine and people read. Of the top folder only: others hold the same in other formats.
WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.md",
          "LICENSE*", "NOTICE*")
# Other formats of weights, and what to say if a model has nothing else.
FOREIGN = {
    ".gguf": "Find the model's repository in Hugging Face format; GGUF is not loaded here.",
    ".bin": "",
    ".pt": "",
    ".pth": "",
}
IMPORT = ("Opening those may run code. Fetch them with --include '*{0}' '*.json' '*.model' '*.txt' "
          "--local-dir DIR, then: python app.py import DIR TARGET.")
SPARE_BYTES = 256 << 20  # left free on the disk


class Hub:
    """A hub that can be asked, and the token for it. Neither plan nor manifest knows the token.

    Args:
        source: "huggingface", "mirror", "modelscope"; "" is the environment's choice.
        endpoint: instead of the source's own.
        token: for this endpoint; None takes the environment's, if the endpoint is the hub's own.

    Raises:
        UserError: one of them is no such thing.
    """

    def __init__(self, source: str = "", endpoint: str = "", token: str | None = None) -> None:
        self.source = source or default_source()
        address = endpoint or default_endpoint(self.source)
        if token is None:
            token = default_token(self.source, address)
        self.connection = Connection(address, token)
        self.protocol: Source = PROTOCOLS[self.source](self.connection)

    @property
    def host(self) -> str:
        return self.connection.host


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file to have: `verified` if it is there already, else `partial` bytes of it are."""

    file: HubFile
    verified: bool
    partial: int

    @property
    def bytes_to_fetch(self) -> int:
        return 0 if self.verified else self.file.size - self.partial


@dataclass(frozen=True, slots=True)
class Plan:
    """A download.

    Attributes:
        revision: what was asked for; `commit` is what that was when the plan was made ("" see
            `Listing`).
        target: the folder that it becomes.
        left_out: bytes of the model's other files.
        disk_free: bytes, where the target is.
    """

    id: str
    source: str
    endpoint: str
    revision: str
    commit: str
    target: Path
    files: tuple[PlannedFile, ...]
    left_out: int
    disk_free: int

    @property
    def total_bytes(self) -> int:
        return sum(planned.file.size for planned in self.files)

    @property
    def bytes_to_fetch(self) -> int:
        return sum(planned.bytes_to_fetch for planned in self.files)

    @property
    def fits(self) -> bool:
        """Whether the disk has room for it, with some to spare."""
        return self.bytes_to_fetch == 0 or self.bytes_to_fetch + SPARE_BYTES <= self.disk_free

    @property
    def complete(self) -> bool:
        """Whether the target is this very version already."""
        manifest = Manifest.read(self.target)
        return manifest is not None and manifest.whole and all(
            _entry(manifest, planned.file) for planned in self.files)

    def manifest(self) -> Manifest:
        """Its manifest, without files."""
        return Manifest(self.id, self.source, self.endpoint, self.revision, self.commit)


def make_plan(
    hub: Hub,
    id: str,
    *,
    revision: str = "",
    local_dir: str | Path | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    patience: Patience | None = None,
) -> Plan:
    """Ask the hub what there is, and look what is there already. Fetches no file.

    Args:
        revision: branch, tag or commit; "" is the hub's main branch.
        local_dir: the target, instead of the folder of downloaded models.
        include: patterns (fnmatch, over whole paths) of files to have instead of the usual.
        exclude: patterns of files not to have.

    Raises:
        UserError: an odd id or revision; a local_dir that holds something else; a model without
            safetensors.
        HubError: see backend/hub/errors.py.
    """
    checked_id(id)
    # A link is followed, so that what is renamed is the folder it leads to.
    target = Path(local_dir).expanduser().resolve() if local_dir else target_of(id, revision)
    _check_target(target, id)
    asked = checked_revision(revision or hub.protocol.default_revision)
    patience = patience or Patience(attempts=3)  # somebody is waiting
    listing = patience.run(hub.host, lambda: hub.protocol.listing(id, asked))
    chosen = choose(listing.files, include, exclude)
    if listing.gated:  # the list is public; whether the files are is told before gigabytes come
        patience.run(hub.host, lambda: _probe(hub, id, listing, asked, chosen))
    folders = (target, draft_of(target))
    manifests = [found for folder in folders if (found := Manifest.read(folder))]
    files = tuple(
        PlannedFile(file, any(_entry(manifest, file) for manifest in manifests),
                    min(_size(part_of(target, file)), file.size))
        for file in chosen)
    left_out = sum(f.size for f in listing.files) - sum(f.size for f in chosen)
    return Plan(id, hub.source, hub.connection.endpoint, asked, listing.commit, target, files,
                left_out, shutil.disk_usage(_existing(target)).free)


def choose(
    files: Iterable[HubFile], include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[HubFile]:
    """The files of a listing to have: `include`, or what the engine reads, less `exclude`.

    Raises:
        UserError: none of them; or, without `include`, no safetensors.
        HubError: one of them has an unusable name, no checksum, or is listed twice.
    """
    listed = [file for file in files if not _is_hidden(file.path)]
    # Of an unusable name the whole model is told, so it must not be passed over as a subfolder's.
    usual = [file for file in listed if "/" not in file.path or ".." in file.path]
    chosen = [file for file in (listed if include else usual)
              if _fits(file.path, include or WANTED) and not _fits(file.path, exclude)]
    if not include:
        if any(fnmatchcase(file.path, "model*.safetensors") for file in chosen):
            # Mistral's: the same weights once more, under its own tensor names.
            chosen = [f for f in chosen if not fnmatchcase(f.path, "consolidated*.safetensors")]
        if not exclude and not any(file.path.endswith(".safetensors") for file in chosen):
            raise _no_safetensors(listed)
    if not chosen:
        raise UserError("No file of the model is called so.", "Check --include and --exclude.",
                        field="include")
    seen: set[str] = set()
    for file in chosen:
        checked_path(file.path)
        if file.path.lower() in seen:
            raise HubError(f"The hub lists {file.path!r:.100} twice.", "Do not use this model.")
        seen.add(file.path.lower())
        if not file.sha256 and not file.blob:
            raise HubError(f"The hub tells no checksum of {file.path!r:.100}.",
                           "Use --source huggingface or modelscope.")
    return chosen


def part_of(target: Path, file: HubFile) -> Path:
    """The beginning of a file, until it is whole. Its name is that of the content, so that a part
    of another version is never continued."""
    return draft_of(target) / ".parts" / (file.sha256 or file.blob)


def _entry(manifest: Manifest, file: HubFile) -> Entry | None:
    entry = manifest.files.get(file.path)
    return entry if entry and entry.matches(file) else None


def _probe(hub: Hub, id: str, listing: Listing, revision: str, chosen: list[HubFile]) -> None:
    file = min(chosen, key=lambda file: file.size)
    with hub.connection.get(hub.protocol.url(id, listing.commit or revision, file.path)):
        pass


def _check_target(target: Path, id: str) -> None:
    """A target is nothing yet, an empty folder, or an earlier download of the same model."""
    if not target.exists() and not target.is_symlink():
        return
    manifest = Manifest.read(target)
    if manifest is not None and manifest.id == id:
        return
    if manifest is None and target.is_dir() and not any(target.iterdir()):
        return
    raise UserError(f"{target} is there already, and is no download of {id}.",
                    "Name another --local-dir, or move it away.", field="local_dir")


def _no_safetensors(files: Iterable[HubFile]) -> UserError:
    for suffix, hint in FOREIGN.items():
        if any(file.path.endswith(suffix) for file in files):
            return UserError(f"The model has no safetensors, only {suffix} files.",
                             hint or IMPORT.format(suffix), field="id")
    return UserError("The model has no safetensors: its repository holds no weights.",
                     "Look at its web page for where they are.", field="id")


def _is_hidden(path: str) -> bool:
    """.gitattributes and the like."""
    return any(part.startswith(".") and part.strip(". ") for part in path.split("/"))


def _fits(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return path if path.exists() else _existing(path.parent)
