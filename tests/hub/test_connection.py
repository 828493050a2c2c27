"""Whom a download talks to, and who gets the token."""

from __future__ import annotations

import gzip
import io

import pytest
import requests
import urllib3

from backend.errors import UserError
from backend.hub.connection import Connection, Passing
from backend.hub.errors import GatedError, HubError, MissingError, OfflineError
from backend.hub.fetch import fetch
from backend.hub.plan import Hub, make_plan
from tests.hub.conftest import ID
from tests.stand_in import send, send_json

TOKEN = "hf_secret"
HUB = "https://huggingface.co"


class Wire(requests.adapters.BaseAdapter):
    """Answers of the world outside, by URL; remembers what was asked."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.seen: list[tuple[str, str | None]] = []
        connection._session.mount("https://", self)
        connection._session.mount("http://", self)

    def send(self, request, **options):
        self.seen.append((request.url, request.headers.get("Authorization")))
        status, headers, content = self.answers[request.url]
        response = requests.Response()
        response.status_code, response.url, response.request = status, request.url, request
        response.headers.update(headers)
        response.raw = urllib3.HTTPResponse(io.BytesIO(content), headers, status,
                                            preload_content=False)
        return response

    def close(self) -> None:
        pass


def to(location: str) -> tuple[int, dict[str, str], bytes]:
    return 302, {"Location": location}, b""


def test_the_token_goes_to_the_hub_and_nowhere_else():
    connection = Connection(HUB, TOKEN)
    wire = Wire(connection)
    wire.answers = {
        f"{HUB}/old/x": to("/new/x"),
        f"{HUB}/new/x": to("https://cdn.example/x?Signature=s"),
        "https://cdn.example/x?Signature=s": (200, {}, b"bytes")}
    assert connection.read(f"{HUB}/old/x", "x") == b"bytes"
    assert [token for _, token in wire.seen] == [f"Bearer {TOKEN}", f"Bearer {TOKEN}", None]


@pytest.mark.parametrize("other", [
    "https://huggingface.co.evil.example/x", "https://huggingface.co:8443/x",
    "https://cas.huggingface.co/x"])
def test_hosts_that_look_like_the_hub_do_not_get_it(other):
    connection = Connection(HUB, TOKEN)
    wire = Wire(connection)
    wire.answers = {f"{HUB}/x": to(other), other: (200, {}, b"")}
    connection.read(f"{HUB}/x", "x")
    assert wire.seen[1] == (other, None)


@pytest.mark.parametrize("target", [
    "http://huggingface.co/x", "http://127.0.0.1/x", "http://169.254.169.254/latest",
    "https://169.254.169.254/latest", "https://user:pass@cdn.example/x", "file:///etc/passwd",
    "ftp://cdn.example/x", "https://2852039166/", "https://[::1", "https://cdn.example:99999/"])
def test_redirects_that_are_not_followed(target):
    connection = Connection(HUB, TOKEN)
    wire = Wire(connection)
    wire.answers = {f"{HUB}/x": to(target)}
    with pytest.raises(HubError, match="redirects"):
        connection.read(f"{HUB}/x", "x")
    assert len(wire.seen) == 1


def test_redirects_end():
    connection = Connection(HUB)
    wire = Wire(connection)
    wire.answers = {f"{HUB}/x": to("/x")}
    with pytest.raises(HubError, match="without end"):
        connection.read(f"{HUB}/x", "x")
    assert len(wire.seen) == 6


def test_nobody_looks_into_netrc(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine huggingface.co login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    connection = Connection(HUB)
    wire = Wire(connection)
    wire.answers = {f"{HUB}/x": (200, {}, b"")}
    connection.read(f"{HUB}/x", "x")
    assert wire.seen == [(f"{HUB}/x", None)]


def test_a_proxy_is_not_between_this_machine_and_itself(stand_in, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert make_plan(Hub("huggingface", stand_in.url), ID)
    assert Connection(HUB)._session.trust_env


def test_tokens_of_the_environment_are_for_their_hub_only(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", f" {TOKEN}\n")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms_secret")
    assert Hub("huggingface").connection.token == TOKEN
    assert Hub("modelscope").connection.token == "ms_secret"
    assert Hub("mirror").connection.token is None
    assert Hub("huggingface", "https://mirror.example").connection.token is None
    assert Hub("mirror", "https://mirror.example", "given").connection.token == "given"
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    hub = Hub()
    assert (hub.source, hub.host, hub.connection.token) == ("mirror", "mirror.example", None)
    monkeypatch.setenv("LMDEPLOY_USE_MODELSCOPE", "True")
    assert Hub().source == "modelscope"


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "\u00fc"])
def test_tokens_that_are_none(token):
    with pytest.raises(UserError, match="no token has") as error:
        Hub("huggingface", HUB, token)
    assert token not in str(error.value)


def test_a_token_is_not_sent_in_the_clear(stand_in):
    with pytest.raises(UserError, match="plain http"):
        Hub("mirror", "http://mirror.example", TOKEN)
    assert Hub("mirror", "http://mirror.example")  # the user wrote it so
    assert Hub("mirror", stand_in.url, TOKEN)  # does not leave the machine


@pytest.mark.parametrize("endpoint", ["ftp://x", "https://a:b@x", "http://169.254.169.254", "a b"])
def test_endpoints_that_are_none(endpoint):
    with pytest.raises(UserError):
        Hub("huggingface", endpoint)
    with pytest.raises(UserError, match="not a hub"):
        Hub("https://huggingface.co")


def test_compressed_answers_are_refused(stand_in):
    """They would make sizes, ranges and bounds mean something else."""
    body = gzip.compress(b"{}" * 1000)
    path = f"/api/models/{ID}/revision/main"
    stand_in.answers[path] = send(200, "application/json", body, Content_Encoding="gzip")
    with pytest.raises(HubError, match="compressed"):
        make_plan(Hub("huggingface", stand_in.url), ID)
    assert stand_in.seen[-1][2]["accept-encoding"] == "identity"


@pytest.mark.parametrize("status, code, token, error", [
    (401, "", "", MissingError), (401, "", TOKEN, GatedError), (401, "GatedRepo", "", GatedError),
    (403, "", "", GatedError), (403, "GatedRepo", TOKEN, GatedError),
    (401, "RepoNotFound", TOKEN, MissingError), (404, "RepoNotFound", "", MissingError),
    (404, "RevisionNotFound", "", MissingError), (404, "EntryNotFound", "", MissingError),
    (410, "", "", MissingError), (451, "", "", HubError), (500, "", "", Passing),
    (429, "", "", Passing), (304, "", "", HubError)])
def test_what_statuses_mean(stand_in, status, code, token, error):
    stand_in.answers["/x"] = send(status, "text/plain", b"no", X_Error_Code=code)
    with pytest.raises(error) as raised:
        Connection(stand_in.url, token).read(f"{stand_in.url}/x", "x")
    assert TOKEN not in str(raised.value) and type(raised.value) is error


def test_a_link_of_the_cdn_that_has_ended_is_asked_for_anew(stand_in):
    hub = Hub("huggingface", stand_in.url)
    plan = make_plan(hub, ID)
    path = f"/lfs/{ID}//config.json"

    def ended(handler):
        del stand_in.answers[path]
        send(403, "application/xml", b"<Code>Expired</Code>")(handler)

    stand_in.answers[path] = ended
    assert fetch(hub, plan, pause=lambda seconds: False)
    stand_in.answers[f"/{ID}/resolve/{plan.commit}/config.json"] = send(403, "", b"")
    (plan.target / "config.json").unlink()
    with pytest.raises(GatedError):
        fetch(hub, make_plan(hub, ID))


def test_neither_token_nor_signature_is_in_messages_or_files(stand_in, home, capfd):
    """Signed URLs of a CDN let anybody in for a while, so they are secrets too."""
    hub = Hub("huggingface", stand_in.url, stand_in.token)
    stand_in.gated.add(ID)
    plan = make_plan(hub, ID)
    said = [repr(plan)]
    stand_in.alter = lambda path, content: content[1:]
    answers = (None, send_json(500, {}), send_json(403, {}), send(302, "", b"", Location="x:/"))
    for answer in answers:
        if answer:
            stand_in.answers[f"/lfs/{ID}//README.md"] = answer
        with pytest.raises(HubError) as error:
            fetch(hub, plan, pause=lambda seconds: False)
        said.append(f"{error.value} {error.value!r}")
    stand_in.answers.clear()
    stand_in.down = True
    with pytest.raises(OfflineError) as error:
        fetch(hub, plan, pause=lambda seconds: False)
    said.append(str(error.value))
    stand_in.down, stand_in.alter = False, lambda path, content: content
    fetch(hub, plan)
    said += [path.read_bytes().decode("latin-1") for path in home.rglob("*") if path.is_file()]
    said += capfd.readouterr()
    assert not [text for text in said if stand_in.token in text or "s3cr3t" in text]
    assert all(headers.get("authorization") is None
               for server, _, headers in stand_in.seen if server == "cdn")
    assert any(headers.get("authorization") == f"Bearer {stand_in.token}"
               for server, _, headers in stand_in.seen if server == "hub")
