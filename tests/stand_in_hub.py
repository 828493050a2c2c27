"""A stand-in for the hubs: Hugging Face's and ModelScope's protocols over folders, with all the
ways in which a hub, a network or a stranger may misbehave."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.stand_in import Answer

CHUNK = 1 << 14
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf")


class StandInHub:
    """Two servers on this machine: the hub, and the CDN that it redirects large files to.

    Args:
        models: id -> folder. May be changed at any time, as all attributes may.

    Attributes:
        gated: ids whose files need `token`; private: ids whose list needs it, too.
        answers: path -> what is answered instead.
        ranges: whether the CDN knows them. range_status: that of a part; ModelScope's is 200.
        blobs: whether the list has sizes and hashes (some mirrors' has not).
        git: whether ModelScope's git tells commits; by_commit: whether its API takes them.
        cut_after: the CDN drops each connection after so many bytes of the body; 0 is never.
        bytes_per_s: of the CDN, for each connection; 0 is as fast as it can.
        alter: path and content of a file -> what the CDN sends instead.
        list_size: added to the sizes of the list.
        names: file -> how the list calls it.
        down: connections are closed without an answer. failing: so many answers of status 503.
        seen: (server, path with query, headers) of every request; server is "hub" or "cdn".
    """

    def __init__(self, models: dict[str, Path] | None = None) -> None:
        self.models = dict(models or {})
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.token = "hf_right"
        self.answers: dict[str, Answer] = {}
        self.ranges, self.range_status = True, 206
        self.blobs = self.git = self.by_commit = True
        self.cut_after = self.bytes_per_s = self.list_size = self.failing = 0
        self.alter: Callable[[str, bytes], bytes] = lambda path, content: content
        self.names: dict[str, str] = {}
        self.down = False
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self._lock = threading.Lock()
        self._servers = [self._serve("hub"), self._serve("cdn")]
        self.url, self.cdn_url = (
            f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def __enter__(self) -> StandInHub:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def fetched(self, name: str) -> list[dict[str, str]]:
        """Headers of the requests for a file's bytes, in order."""
        return [headers for server, path, headers in self.seen
                if server == "cdn" and unquote(urlsplit(path).path).endswith("/" + name)]

    def commit(self, id: str) -> str:
        """Changes with the files, as a commit does."""
        digest = hashlib.sha1(id.encode())
        for path in self.files(id):
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()

    def files(self, id: str) -> list[Path]:
        return sorted(path for path in self.models[id].rglob("*") if path.is_file())

    def _serve(self, role: str) -> ThreadingHTTPServer:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                hub.seen.append((role, self.path, headers))
                try:
                    hub._answer(self, role)
                except OSError:
                    pass  # the client has hung up, as some tests want it to

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.block_on_close = False  # some answers are slow on purpose
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    def _answer(self, handler: BaseHTTPRequestHandler, role: str) -> None:
        parts = urlsplit(handler.path)
        path = unquote(parts.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        with self._lock:
            failing, self.failing = self.failing > 0, max(0, self.failing - 1)
        if self.down:
            handler.close_connection = True
        elif failing:
            _json(handler, 503, {"error": "overloaded"})
        elif path in self.answers:
            self.answers[path](handler)
        elif role == "cdn":
            id, _, name = path.removeprefix("/lfs/").partition("//")
            self._bytes(handler, self.models[id] / name)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/(.+)", path):
            if self._known(handler, found[1], found[3], self.private):
                self._list(handler, found[1], found[2])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if self._known(handler, found[1], found[2], self.gated | self.private):
                self._resolve(handler, found[1], found[3])
        elif found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo/files", path):
            self._modelscope_list(handler, found[1], query["Revision"])
        elif found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo", path):
            self._redirect(handler, found[1], query["FilePath"])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/refs", path):
            self._refs(handler, found[1])
        else:
            _json(handler, 404, {"error": "Not Found"})

    def _known(self, handler: BaseHTTPRequestHandler, id: str, revision: str,
               closed: set[str]) -> bool:
        """Whether there is such a model for who asks; if not, it was told, as Hugging Face does."""
        given = handler.headers.get("Authorization")
        right = given == f"Bearer {self.token}"
        problem = None
        if given and not right:
            problem = 401, "", "Invalid credentials in Authorization header"
        elif id not in self.models or (id in closed & self.private and not right):
            problem = (404 if right else 401), "RepoNotFound", "Repository not found"
        elif id in closed and not right:
            problem = 401, "GatedRepo", "Access to this model is restricted"
        elif revision not in ("main", "refs/pr/1", self.commit(id)):
            problem = 404, "RevisionNotFound", "Invalid rev id"
        if problem:
            _json(handler, problem[0], {"error": problem[2]},
                  **{"X-Error-Code": problem[1], "X-Error-Message": problem[2]})
        return problem is None

    def _entries(self, id: str) -> list[tuple[str, int, str, str, bool]]:
        """(path, size, sha256, blob, is large) of each file, as a list has them."""
        found = []
        for path in self.files(id):
            content, name = path.read_bytes(), path.relative_to(self.models[id]).as_posix()
            large = name.endswith(LFS_SUFFIXES)
            pointer = f"pointer to {name}".encode() if large else content
            blob = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
            found.append((self.names.get(name, name), len(content) + self.list_size,
                          hashlib.sha256(content).hexdigest(), blob, large))
        return found

    def _list(self, handler: BaseHTTPRequestHandler, id: str, kind: str) -> None:
        if kind == "tree":
            _json(handler, 200, [
                {"type": "directory", "path": "somewhere", "oid": "0" * 40, "size": 0},
                *({"type": "file", "path": name, "size": size, "oid": blob,
                   **({"lfs": {"oid": sha256, "size": size, "pointerSize": 130}} if large else {})}
                  for name, size, sha256, blob, large in self._entries(id))])
            return
        siblings: list[dict[str, Any]] = [{"rfilename": entry[0]} for entry in self._entries(id)]
        if self.blobs:
            for sibling, (_, size, sha256, blob, large) in zip(siblings, self._entries(id)):
                sibling |= {"size": size, "blobId": blob}
                if large:
                    sibling["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 130}
        _json(handler, 200, {"id": id, "sha": self.commit(id), "siblings": siblings,
                             "private": False, "gated": "auto" if id in self.gated else False})

    def _resolve(self, handler: BaseHTTPRequestHandler, id: str, name: str) -> None:
        if not (self.models[id] / name).is_file():
            _json(handler, 404, {"error": "Entry not found"}, **{"X-Error-Code": "EntryNotFound"})
            return
        self._redirect(handler, id, name)

    def _redirect(self, handler: BaseHTTPRequestHandler, id: str, name: str) -> None:
        """To the CDN, another origin, with a signature that is a secret."""
        content = (self.models[id] / name).read_bytes()
        handler.send_response(302)
        handler.send_header("X-Repo-Commit", self.commit(id))
        handler.send_header("X-Linked-Size", str(len(content)))
        handler.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
        handler.send_header("Location",
                            f"{self.cdn_url}/lfs/{id}//{quote(name)}?Signature=s3cr3t")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def _modelscope_list(self, handler: BaseHTTPRequestHandler, id: str, revision: str) -> None:
        known = "master", self.commit(id) if self.by_commit and id in self.models else ""
        if id not in self.models or revision not in known:
            _json(handler, 200, {"Code": 10010205001, "Message": "not found", "Success": False})
            return
        files = [{"Path": name, "Name": name, "Size": size, "Sha256": sha256, "Type": "blob",
                  "IsLFS": large, "Revision": "0" * 40}
                 for name, size, sha256, _, large in self._entries(id)]
        files.append({"Path": "somewhere", "Size": 0, "Sha256": "", "Type": "tree"})
        _json(handler, 200, {"Code": 200, "Success": True, "Data": {
            "Files": files, "LatestCommitter": {"Id": "", "ShortId": self.commit(id)[:8]}}})

    def _refs(self, handler: BaseHTTPRequestHandler, id: str) -> None:
        if not self.git or id not in self.models:
            _json(handler, 404, {})
            return
        commit = self.commit(id)
        lines = [f"{commit} HEAD\0multi_ack side-band-64k\n", f"{commit} refs/heads/master\n"]
        text = "001e# service=git-upload-pack\n0000"
        text += "".join(f"{len(line) + 4:04x}{line}" for line in lines) + "0000"
        handler.send_response(200)
        handler.send_header("Content-Type", "application/x-git-upload-pack-advertisement")
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text.encode())

    def _bytes(self, handler: BaseHTTPRequestHandler, path: Path) -> None:
        content = self.alter(path.name, path.read_bytes())
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        start = int(asked[1]) if asked and self.ranges else 0
        if start and start >= len(content):
            handler.send_response(416)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        handler.send_response(self.range_status if start else 200)
        if start:
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            handler.send_header("Content-Range", span)
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        end = min(len(content), start + self.cut_after) if self.cut_after else len(content)
        while start < end:
            piece = content[start:min(start + CHUNK, end)]
            handler.wfile.write(piece)
            start += len(piece)
            if self.bytes_per_s:
                time.sleep(len(piece) / self.bytes_per_s)
        handler.close_connection = True


def _json(handler: BaseHTTPRequestHandler, status: int, value: Any, **headers: str) -> None:
    data = json.dumps(value).encode()
    handler.send_response(status)
    for name, text in {"Content-Type": "application/json", **headers}.items():
        handler.send_header(name, text)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)
