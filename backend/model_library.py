"""The models that the page may offer: those in folders that the operator allows, and no others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from backend.errors import UserError
from backend.hub.library import MANIFEST
from backend.workspace.layout import workspace_of

DEPTH = 2  # folders below a root: NAMESPACE/NAME


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A folder that holds a model.

    Attributes:
        name: for people: its path below the root it was found in.
        kind: "bundled", "download", "workspace", or "folder".
        bytes: of its weights on disk.
    """

    path: Path
    name: str
    kind: str
    bytes: int


class ModelLibrary:
    """Looks for models in `roots`, each of them a model itself or a folder of models.

    Args:
        bundled: the model in the box.
        roots: further folders, in the order in which their models are listed.
    """

    def __init__(self, bundled: Path, roots: Sequence[Path] = ()) -> None:
        self.bundled = bundled
        self.roots = tuple(roots)

    def models(self) -> list[LocalModel]:
        """All models that are there now; those in the making have hidden names, and are not."""
        found = {self.bundled.resolve(): LocalModel(self.bundled, self.bundled.name, "bundled",
                                                    _weight_bytes(self.bundled))}
        for root in self.roots:
            for folder in _model_folders(root, DEPTH):
                name = folder.name if folder == root else folder.relative_to(root).as_posix()
                model = LocalModel(folder, name, _kind(folder), _weight_bytes(folder))
                found.setdefault(folder.resolve(), model)
        return list(found.values())

    def checked(self, path: str, field: str = "model") -> Path:
        """The folder that a page names, with links followed, if it is allowed and there.

        Raises:
            UserError: it is in none of the roots, or no folder.
        """
        folder = self.allowed(path, field)
        if not folder.is_dir():
            raise UserError(f"There is no model {path!r:.200}.", "Choose one of the list.",
                            field=field)
        return folder

    def allowed(self, path: str, field: str = "path") -> Path:
        """A path inside the roots, with links followed; it need not be there.

        Raises:
            UserError: it is in none of the roots.
        """
        if not isinstance(path, str) or not path.strip() or "\0" in path:
            raise UserError("No model is chosen.", "Choose one of the list.", field=field)
        folder = Path(path).expanduser().resolve()
        if not any(folder.is_relative_to(r.resolve()) for r in (self.bundled, *self.roots)):
            raise UserError(
                f"{path!r:.200} is in none of the folders that this page may use.",
                "Put it below one of them, or name its folder when the server is started: "
                "--model-dirs DIR.", field=field)
        return folder


def _model_folders(root: Path, depth: int) -> Iterator[Path]:
    if _is_model(root):
        yield root
        return  # what is inside it belongs to it
    if depth == 0:
        return
    try:
        inside = sorted(p for p in root.iterdir() if p.name[0] != "." and p.is_dir())
    except OSError:
        return
    for folder in inside:
        yield from _model_folders(folder, depth - 1)


def _is_model(folder: Path) -> bool:
    if workspace_of(folder) == folder.absolute():
        return True
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _kind(folder: Path) -> str:
    if workspace_of(folder) is not None:
        return "workspace"
    return "download" if (folder / MANIFEST).is_file() else "folder"


def _weight_bytes(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            if name.endswith((".safetensors", ".bin")):
                total += os.stat(os.path.join(place, name)).st_size
    return total
