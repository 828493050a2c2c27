"""Names that people and hubs give: of hubs, models, revisions, files. Light to import."""

from __future__ import annotations

import os
import re

from backend.errors import UserError
from backend.hub.errors import HubError

# Name -> default endpoint.
ENDPOINTS = {
    "huggingface": "https://huggingface.co",
    "mirror": "https://hf-mirror.com",
    "modelscope": "https://www.modelscope.cn",
}
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?"
_ID = re.compile(f"{_PART}/{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,199}", re.ASCII)
# No ".", "..", hidden name, backslash, drive, control character; no dot or space at the end.
_NAME = re.compile(r"(?![. ])[^\x00-\x1f\x7f/\\:]{1,200}(?<![. ])")


def default_source() -> str:
    """The hub to ask if none is named: by the variables that users of other tools have set."""
    if os.environ.get("LMDEPLOY_USE_MODELSCOPE", "").lower() in ("1", "true", "yes", "on"):
        return "modelscope"
    return "mirror" if os.environ.get("HF_ENDPOINT") else "huggingface"


def default_endpoint(source: str) -> str:
    """Where a source is; HF_ENDPOINT says where the mirror is.

    Raises:
        UserError: there is no such source.
    """
    if source not in ENDPOINTS:
        raise UserError(f"{source!r:.100} is not a hub.", f"Use one of: {', '.join(ENDPOINTS)}.",
                        field="source")
    return (source == "mirror" and os.environ.get("HF_ENDPOINT")) or ENDPOINTS[source]


def default_token(source: str, endpoint: str) -> str | None:
    """The environment's token for a hub. It is for that hub: no other endpoint gets it."""
    if endpoint != ENDPOINTS.get(source) or source == "mirror":
        return None
    name = "HF_TOKEN" if source == "huggingface" else "MODELSCOPE_API_TOKEN"
    return os.environ.get(name, "").strip() or None


def is_id(text: str) -> bool:
    """Whether it can be a model's id: NAMESPACE/NAME."""
    return bool(_ID.fullmatch(text)) and ".." not in text


def checked_id(text: str) -> str:
    """The id. Raises UserError if it is none."""
    if not is_id(text):
        raise UserError(f"{text!r:.200} is not the id of a model.",
                        "Ids are NAMESPACE/NAME, such as Qwen/Qwen2.5-0.5B-Instruct.", field="id")
    return text


def id_of_page(text: str) -> str:
    """The id in the address of a model's page on a hub; any other text as it is."""
    for endpoint in ENDPOINTS.values():
        if text.startswith(endpoint + "/"):
            parts = text.removeprefix(endpoint).removeprefix("/models").strip("/").split("/")
            return "/".join(parts[:2])
    return text


def checked_revision(text: str) -> str:
    """The revision. Raises UserError if it is none."""
    if not _REVISION.fullmatch(text) or ".." in text:
        raise UserError(f"{text!r:.200} is not a revision.",
                        "Give a branch, a tag or a commit.", field="revision")
    return text


def checked_path(path: str) -> str:
    """A path of a listing that stays inside the folder it is joined to.

    Raises:
        HubError: it is absolute, has "..", or has names that some system reads otherwise.
    """
    parts = path.split("/")
    if len(parts) > 20 or not all(map(_NAME.fullmatch, parts)):
        raise HubError(f"The hub lists a file with an unusable name: {path!r:.100}.",
                       "Nothing was fetched. Do not use this model.")
    return path
