"""The hubs' protocols: which files a model has, and where each one lies.

One fetcher of our own serves all of them. huggingface_hub cannot speak to ModelScope, fetches
through Xet past a mirror, and begins a file anew after a kill; two libraries would also mean two
sets of rules about tokens, redirects and hashes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote, urlencode

from backend.hub.connection import Connection, Passing
from backend.hub.errors import HubError, MissingError

MAX_FILES = 20_000
MAX_FILE_BYTES = 1 << 50
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file as a hub lists it.

    Attributes:
        path: POSIX, relative to the model's folder; checked, see `checked_path`.
        size: bytes.
        sha256: of its content, hexadecimal; "" if the hub does not tell (small files of git).
        blob: git's SHA-1 of the blob; "" if the hub does not tell.
    """

    path: str
    size: int
    sha256: str
    blob: str


@dataclass(frozen=True, slots=True)
class Listing:
    """All files of a model at one commit.

    Attributes:
        commit: 40 hexadecimal digits. "" if ModelScope's git cannot be asked, or its API takes
            no commits: then the files' SHA-256 alone, of which it has all, hold the content fast.
        gated: the hub wants terms to be accepted, so files may be refused though the list is not.
    """

    commit: str
    files: tuple[HubFile, ...]
    gated: bool = False


class Source(Protocol):
    """A hub's protocol over a connection to it."""

    default_revision: str

    def listing(self, id: str, revision: str) -> Listing: ...

    def url(self, id: str, revision: str, path: str) -> str: ...


class HuggingFace:
    """huggingface.co and its mirrors."""

    default_revision = "main"

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def listing(self, id: str, revision: str) -> Listing:
        root = f"{self._connection.endpoint}/api/models/{id}"
        url = f"{root}/revision/{quote(revision, safe='')}?blobs=true"
        info = _mapping(self._connection.read_json(url, "the list of files"))
        commit = info.get("sha")
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise self._nonsense()
        entries = [_mapping(entry) for entry in _sequence(info.get("siblings"))]
        if any("size" not in entry or not (entry.get("lfs") or entry.get("blobId"))
               for entry in entries):  # a mirror that does not know `blobs`
            files = self._tree(root, commit)
        else:
            files = [_file(entry.get("rfilename"), entry.get("size"),
                           _mapping(entry.get("lfs") or {}).get("sha256"), entry.get("blobId"))
                     for entry in entries]
        return Listing(commit, tuple(files), bool(info.get("gated")))

    def _tree(self, root: str, commit: str) -> list[HubFile]:
        url = f"{root}/tree/{commit}?recursive=true"
        entries = _sequence(self._connection.read_json(url, "the list of files"))
        if len(entries) >= 1000:  # it comes in pages; who has no `blobs` may have no pages either
            raise HubError(f"{self._connection.host} lists too many files.",
                           "Use --source huggingface or modelscope.")
        return [_file(entry.get("path"), entry.get("size"),
                      _mapping(entry.get("lfs") or {}).get("oid"), entry.get("oid"))
                for entry in map(_mapping, entries) if entry.get("type") == "file"]

    def url(self, id: str, revision: str, path: str) -> str:
        revision = quote(revision, safe="")
        return f"{self._connection.endpoint}/{id}/resolve/{revision}/{quote(path)}"

    def _nonsense(self) -> HubError:
        return HubError(f"{self._connection.host} does not answer like a hub.",
                        "Check the endpoint.")


class ModelScope:
    """modelscope.cn. It lists a SHA-256 for every file. Its API names no commit, its git does."""

    default_revision = "master"

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def listing(self, id: str, revision: str) -> Listing:
        commit = revision if _COMMIT.fullmatch(revision) else self._commit(id, revision)
        if commit and commit != revision:
            try:
                return Listing(commit, self._files(id, commit))
            except MissingError:  # its own library asks for branches and tags only
                commit = ""
        return Listing(commit, self._files(id, revision))

    def _files(self, id: str, revision: str) -> tuple[HubFile, ...]:
        query = urlencode({"Revision": revision, "Recursive": "True"})
        url = f"{self._connection.endpoint}/api/v1/models/{id}/repo/files?{query}"
        answer = _mapping(self._connection.read_json(url, "the list of files"))
        if answer.get("Success") is False:  # it says so with status 200
            raise MissingError(f"{self._connection.host} has no such model or revision.",
                               "Check the spelling: NAMESPACE/NAME.")
        entries = map(_mapping, _sequence(_mapping(answer.get("Data")).get("Files")))
        return tuple(_file(entry.get("Path"), entry.get("Size"), entry.get("Sha256"), "")
                     for entry in entries if entry.get("Type") == "blob")

    def url(self, id: str, revision: str, path: str) -> str:
        query = urlencode({"Revision": revision, "FilePath": path})
        return f"{self._connection.endpoint}/api/v1/models/{id}/repo?{query}"

    def _commit(self, id: str, revision: str) -> str:
        """What git's list of references says the branch or tag is at; "" if there is none."""
        url = f"{self._connection.endpoint}/{id}.git/info/refs?service=git-upload-pack"
        try:
            text = self._connection.read(url, "the list of branches").decode("ascii", "replace")
        except (HubError, Passing):  # the list of files will tell what is wrong
            return ""
        for kind in ("heads", "tags"):
            name = re.escape(f"refs/{kind}/{revision}")
            # An annotated tag has a line of its own for the commit that it means: name^{}.
            for end in (r"\^\{\}", ""):
                if found := re.search(rf"([0-9a-f]{{40}}) {name}{end}[\0\n]", text):
                    return found[1]
        return ""


PROTOCOLS: dict[str, Callable[[Connection], Source]] = {
    "huggingface": HuggingFace, "mirror": HuggingFace, "modelscope": ModelScope}


def _file(path: Any, size: Any, sha256: Any, blob: Any) -> HubFile:
    sha256 = sha256.lower() if isinstance(sha256, str) else ""
    blob = blob.lower() if isinstance(blob, str) else ""
    if type(size) is not int or not 0 <= size <= MAX_FILE_BYTES:
        raise HubError(f"The hub lists no size for {path!r:.100}.", "Try another --source.")
    return HubFile(path if isinstance(path, str) else repr(path), size,
                   sha256 if _SHA256.fullmatch(sha256) else "",
                   blob if _COMMIT.fullmatch(blob) else "")


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise HubError("The hub's list of files is not one.", "Check the endpoint.")
    return value


def _sequence(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > MAX_FILES:
        raise HubError("The hub's list of files is not one.", "Check the endpoint.")
    return value
