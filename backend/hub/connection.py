"""GET requests to a hub, with our rules: who is contacted, who gets the token, what is taken.

`requests` does the HTTP and knows proxies and certificates; redirects are followed here, because
the rules hold for each of them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from backend.errors import UserError
from backend.hub.errors import GatedError, HubError, MissingError, OfflineError
from backend.keyfile import is_sendable
from backend.remote_http import is_loopback_url, normalise_url

CONNECT_S, IDLE_S = 10.0, 20.0
MAX_REDIRECTS = 5
MAX_LISTING_BYTES = 32 << 20
OFFLINE_HINT = (
    "Check the network and the proxy settings; python app.py download has other hubs by --source.")
# Statuses that may be otherwise in a moment: worth another attempt.
PASSING = {408, 425, 429, 500, 502, 503, 504}


class Passing(Exception):
    """It went wrong for now: try again.

    Args:
        reason: what happened, as the middle of a sentence. No URL: redirects' are signed.
        wait_s: how long the server wants to be left alone.
    """

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.wait_s = reason, wait_s


class _Token(requests.auth.AuthBase):
    """The token or nothing. As long as there is one, requests doesn't look into ~/.netrc."""

    def __init__(self, token: str | None) -> None:
        self.token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.token:
            request.headers["Authorization"] = f"Bearer {self.token}"
        return request


class _Session(requests.Session):
    """Leaves redirects alone: else it would parse their targets and read their bodies, however
    large, even if told not to follow them."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        return None


class Connection:
    """To one hub.

    Args:
        endpoint: `scheme://host[:port][/prefix]`. Plain http only if the caller's user wrote so.
        token: goes to that origin and nowhere else, and over https (or to this machine) only.

    Raises:
        UserError: the endpoint is no URL, or the token no token.
    """

    def __init__(self, endpoint: str, token: str | None = None) -> None:
        self.endpoint = normalise_url(endpoint)
        self.host = urlsplit(self.endpoint).netloc
        self._origin = _origin(self.endpoint)
        self._loopback = is_loopback_url(self.endpoint)
        if token and not is_sendable(token):
            raise UserError("The hub's token has characters that no token has.",
                            "Copy it again, without spaces and line breaks.", field="token")
        if token and not self._loopback and self._origin[0] != "https":
            raise UserError(f"A token is not sent to {self.host} over plain http.",
                            "Write the endpoint with https://, or leave the token away.",
                            field="token")
        self.token = token or None
        self._session = _Session()
        self._session.trust_env = not self._loopback  # no proxy between this machine and itself
        self._session.headers.update({
            "User-Agent": "lmdesk", "Accept": "*/*",
            "Accept-Encoding": "identity",  # sizes, ranges and hashes are of the file itself
        })

    @contextlib.contextmanager
    def get(self, url: str, headers: Mapping[str, str] = {}) -> Iterator[requests.Response]:
        """An answer of status 200, 206 or 416, its body not read yet. `headers` are sent besides.

        Raises:
            Passing: no connection, or a status that passes.
            HubError: an answer that stays as it is; see `_refusal`.
        """
        response = self._follow(url, headers)
        with response:
            if response.status_code in PASSING:
                raise Passing(f"it answered with status {response.status_code}",
                              _retry_after(response))
            if response.status_code not in (200, 206, 416):
                raise self._refusal(response)
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise HubError(f"{self.host} sent a compressed answer, which it was told not to.",
                               "Try another --source.")
            yield response

    def read(self, url: str, what: str) -> bytes:
        """The body at `url`, of a bounded size. Raises as `get` and `body`; `what` is its name."""
        with self.get(url) as response:
            pieces, size = [], 0
            for piece in body(response):
                size += len(piece)
                if size > MAX_LISTING_BYTES:
                    raise HubError(f"{self.host} sent too much as {what}.", "Check the endpoint.")
                pieces.append(piece)
        return b"".join(pieces)

    def read_json(self, url: str, what: str) -> Any:
        """The JSON at `url`. Raises as `read`; HubError also if it is no JSON."""
        try:
            return json.loads(self.read(url, what))
        except (ValueError, RecursionError):  # a web page to log in at, or of another service
            raise HubError(f"{self.host} does not answer like a hub.",
                           "Check the endpoint, and whether this network wants a login.") from None

    def _follow(self, url: str, headers: Mapping[str, str]) -> requests.Response:
        for _ in range(MAX_REDIRECTS + 1):
            token = self.token if _origin(url) == self._origin else None
            try:
                response = self._session.get(
                    url, headers=dict(headers), auth=_Token(token), stream=True,
                    allow_redirects=False, timeout=(CONNECT_S, IDLE_S))
            except requests.exceptions.SSLError:
                raise OfflineError(f"The certificate of {urlsplit(url).hostname} is not valid.",
                                   "Check the clock, the proxy and the endpoint.") from None
            except requests.exceptions.InvalidURL:
                raise HubError(f"{self.host} redirects to what is no URL.") from None
            except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
                raise Passing(_reason(error)) from None
            if response.status_code not in (301, 302, 303, 307, 308):
                return response
            response.close()
            url = self._redirect(url, response.headers.get("Location", ""))
        raise HubError(f"{self.host} redirects without end.", "Try another --source.")

    def _redirect(self, url: str, location: str) -> str:
        """The target of a redirect, if it may be contacted: https, the hub's own origin, or, for a
        hub on this machine, this machine."""
        try:
            url = urljoin(url, location)
            parts = urlsplit(url)
            bare = f"{parts.scheme}://{parts.netloc}"
            normalise_url(bare)  # no password, no metadata service, no odd address
            allowed = (parts.scheme == "https" or _origin(url) == self._origin
                       or (self._loopback and is_loopback_url(bare)))
        except (UserError, ValueError):  # no URL at all
            allowed = False
        if not allowed:
            raise HubError(f"{self.host} redirects to an address that is not contacted.",
                           "Only https is followed. Try another --source.")
        return url

    def _refusal(self, response: requests.Response) -> HubError:
        """What a status of 4xx means. Hugging Face says more in X-Error-Code; without a token it
        answers 401 for what is missing too.

        Raises:
            Passing: it is not the hub's own. A CDN's links end; the next attempt gets a new one.
        """
        if _origin(response.url) != self._origin:
            host = urlsplit(response.url).hostname
            raise Passing(f"{host} answered with status {response.status_code}")
        status, code = response.status_code, response.headers.get("X-Error-Code", "")
        if code == "GatedRepo" or status == 403 or (status == 401 and self.token and not code):
            if not self.token:
                return GatedError(
                    f"The model is gated: {self.host} gives it to people who accepted its terms.",
                    "Accept them on its web page, then set HF_TOKEN (for ModelScope "
                    "MODELSCOPE_API_TOKEN) or give --token-file.")
            return GatedError(
                f"{self.host} does not give the model to this token.",
                "Accept the model's terms on its web page with the token's account, and check "
                "that the token is valid and may read.")
        if code == "RevisionNotFound":
            return MissingError(f"{self.host} has the model, but not that revision.",
                                "Check --revision.")
        if code == "EntryNotFound":
            return MissingError(f"{self.host} no longer has a file of the model.", "Try again.")
        if status in (401, 404, 410):
            private = "" if self.token else ", or it is private and needs a token"
            return MissingError(f"{self.host} has no such model{private}.",
                                "Check the spelling: NAMESPACE/NAME.")
        return HubError(f"{self.host} refused with status {status}.", "Try another --source.")


def body(response: requests.Response, most: int = 1 << 20) -> Iterator[bytes]:
    """The body in pieces of at most `most` bytes, each as soon as it is there.

    Raises:
        Passing: the connection broke or stalled, or ended before Content-Length was reached.
    """
    try:
        while piece := response.raw.read1(most, decode_content=False):
            yield piece
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise Passing(_reason(error)) from None


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, (parts.hostname or "").lower(), port


def _retry_after(response: requests.Response) -> float:
    text = response.headers.get("Retry-After", "")
    return min(float(text), 300.0) if text.isdecimal() else 0.0


def _reason(error: Exception) -> str:
    timeouts = (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)
    if isinstance(error, timeouts):
        return "it does not answer"
    if isinstance(error, requests.ConnectionError):
        return "it cannot be reached"
    return "the connection broke"
