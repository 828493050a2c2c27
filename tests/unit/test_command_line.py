"""The command line: mistakes end in one sentence and exit code 2, servers end without a trace."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

import app
from backend import chat_commands
from backend.config import ServerConfig
from backend.server.listen import bind, local_url, tunnel_line
from tests.app_process import BOUND_S, ROOT, AppProcess, assert_gone, environment
from tests.tiny_model import make_checkpoint

Run = Callable[..., str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in several shards."""
    folder = tmp_path_factory.mktemp("command-line") / "tiny"
    make_checkpoint(folder, "llama", shard_size="100KB")
    return folder


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(model, tmp_path / "damaged"))


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line that must fail; returns its one sentence."""

    def run(*argv: str | Path) -> str:
        capfd.readouterr()
        assert app.main([str(word) for word in argv]) == 2
        said = capfd.readouterr()
        assert said.out == ""
        return only_line(said.err)

    return run


def only_line(stderr: str) -> str:
    assert re.fullmatch(r"lmdesk: [^\n]+\n", stderr), stderr
    return stderr.removeprefix("lmdesk: ").strip()


# What a command line says


def test_parse_fills_in_the_command_and_takes_underscores():
    args = app.parse(["some/model", "--server_name", "0.0.0.0", "--server_port=7000"])
    assert args.run is app.run_page and args.model == "some/model"
    assert args.server_name == "0.0.0.0" and args.server_port == 7000
    assert app.parse([]).run is app.run_page
    args = app.parse(["serve", "api_server", "m", "--cache_max_entry_count", "0.5", "--tp", "2"])
    assert args.run is app.run_api_server
    assert (args.model, args.cache_max_entry_count, args.tp) == ("m", 0.5, 2)
    assert app.parse(["serve", "gradio", "http://0.0.0.0:23333"]).run is app.run_gradio
    args = app.parse(["chat", "m", "--temperature", "0", "--system", "with_under_score"])
    assert args.run is chat_commands.run_chat and args.system == "with_under_score"


@pytest.mark.parametrize(("argv", "words"), [
    (["--bogus", "3"], ["--bogus", "--help"]),
    (["serve"], ["api_server", "gradio", "--help"]),
    (["serve", "both"], ["both", "api_server", "gradio"]),
    (["--tp", "0"], ["tp must be from 1 to 64, not 0"]),
    (["--tp", "two"], ["--tp", "two", "--help"]),
    (["--dtype", "int3"], ["--dtype", "int3", "bfloat16"]),
    (["--max-batch-size", "1.5"], ["--max-batch-size", "1.5"]),
    (["--session-len", "3"], ["session_len", "at least 16"]),
    (["--cache-max-entry-count", "nan"], ["cache_max_entry_count", "nan"]),
    (["--enable-prefix-caching", "maybe"], ["--enable-prefix-caching", "maybe"]),
    (["--server-port", "70000"], ["server_port", "65535", "70000"]),
    (["chat", "--temperature", "9"], ["temperature must be from 0.0 to 2.0, not 9.0"]),
    (["serve", "gradio", "http://"], ["http://", "http://127.0.0.1:23333"]),
    (["serve", "gradio", "ftp://host:1"], ["ftp://host:1", "http://127.0.0.1:23333"]),
    (["serve", "gradio", "http://user:secret@host:1"], ["URL", "password", "API key"]),
    (["serve", "api_server", "127.0.0.1:23333"], ["127.0.0.1:23333", "folder"]),
], ids=" ".join)
def test_bad_flags(refused: Run, argv: list[str], words: list[str]):
    sentence = refused(*argv)
    assert all(word in sentence for word in words), sentence


def test_help_is_no_mistake(capfd: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        app.main(["serve", "api_server", "--help"])
    assert ended.value.code == 0
    assert "--cache-max-entry-count" in capfd.readouterr().out


# Models that cannot be served


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def truncate(folder: Path) -> None:
    os.truncate(shard(folder), shard(folder).stat().st_size - 100)


def rename(folder: Path) -> None:
    shard(folder).rename(folder / "renamed.safetensors")


def swap(folder: Path) -> None:
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    first.rename(folder / "third")
    second.rename(first)
    (folder / "third").rename(second)


def put_nan(folder: Path) -> None:
    tensors = load_file(shard(folder))
    tensors[min(tensors)].view(-1)[7] = torch.nan
    save_file(tensors, shard(folder), {"format": "pt"})


def only_pickle(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "not a model": (lambda f: [p.unlink() for p in f.iterdir()], ["damaged", "tokenizer.json"]),
    "no config.json": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "config.json is no JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json"]),
    "config.json is a list": (lambda f: (f / "config.json").write_text("[1]"), ["config.json"]),
    "unknown architecture": (
        lambda f: edit_config(f, architectures=["GPT2LMHeadModel"]),
        ["GPT2LMHeadModel", "LlamaForCausalLM"]),
    "wrong type in config.json": (
        lambda f: edit_config(f, num_hidden_layers="two"), ["num_hidden_layers", "'two'"]),
    "shapes disagree": (
        lambda f: edit_config(f, intermediate_size=256), ["mlp", "[128, 64]", "[256, 64]"]),
    "layers are missing": (lambda f: edit_config(f, num_hidden_layers=3), ["model.layers.2"]),
    "truncated shard": (truncate, ["model-00001", "truncated", "Download"]),
    "renamed shard": (rename, ["model-00001", "missing", "Download"]),
    "swapped shards": (swap, ["model-0000", "renamed", "Download"]),
    "no index": (
        lambda f: (f / "model.safetensors.index.json").unlink(), ["model.safetensors.index.json"]),
    "pickle only": (only_pickle, ["pytorch_model.bin", "safetensors"]),
    "NaN weights": (put_nan, ["NaN", "Download"]),
    "broken tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"), ["tokenizer.json", "Download"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_models(refused: Run, copy: Path, damage: str):
    work, words = DAMAGE[damage]
    work(copy)
    sentence = refused("chat", copy, "--inline")
    assert all(word in sentence for word in words), sentence


def test_wrong_paths(refused: Run, model: Path):
    missing = model / "typo"
    assert str(missing) in refused(missing)
    file = model / "config.json"
    sentence = refused("serve", "api_server", file)
    assert str(file) in sentence and "file" in sentence
    assert "no model folder" in refused("run", "12345")  # a number is no address


def test_sizes_that_cannot_be(refused: Run, model: Path):
    sentence = refused("chat", model, "--inline", "--cache-max-entry-count", "1e12")
    assert "GB" in sentence and "cache_max_entry_count" in sentence
    assert "tp 3 " in refused("chat", model, "--inline", "--tp", "3")


# Addresses


@contextmanager
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


def test_busy_port(refused: Run, model: Path):
    with busy_port() as port:
        sentence = refused("serve", "api_server", model, "--inline", "--server-port", str(port))
        assert f"Port {port} is in use" in sentence and "--server-port" in sentence
        sock, config = bind(ServerConfig(server_port=port), fixed_port=False)
        sock.close()
        assert port < config.server_port <= port + 100


def test_pieces_of_a_stream_do_not_wait_for_one_another():
    """What asyncio takes for a TCP socket, so that it sets TCP_NODELAY on what it accepts."""
    sock, _ = bind(ServerConfig(server_port=0), fixed_port=True)
    with sock:
        assert sock.proto == socket.IPPROTO_TCP


@pytest.mark.parametrize("name", ["192.0.2.1", "no.such.host.invalid", ".."])
def test_addresses_of_other_machines(refused: Run, model: Path, name: str):
    sentence = refused("serve", "api_server", model, "--inline", "--server-name", name)
    assert name in sentence and "127.0.0.1" in sentence


def test_a_model_that_would_pass_for_a_key(refused: Run, model: Path):
    sentence = refused("serve", "api_server", "--api-keys", "secret-key-1", model)
    assert str(model) in sentence and "before --api-keys" in sentence


def test_flags_of_a_model_do_not_fit_a_server(refused: Run):
    sentence = refused("serve", "gradio", "http://127.0.0.1:9", "--session-len", "64")
    assert "--session-len" in sentence and "serves the model" in sentence


def test_bad_key(refused: Run, model: Path):
    sentence = refused(
        "serve", "api_server", model, "--inline", "--server-port", "0", "--api-keys", "short")
    assert "API key" in sentence and "8" in sentence


class Foreign(http.server.BaseHTTPRequestHandler):
    """A web server that is no api_server."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>Welcome</html>")

    def log_message(self, *args: object) -> None:
        """Not on our stderr."""


def test_chat_with_a_server_that_is_dead_or_none(refused: Run):
    with socket.socket() as bound:  # nobody listens, and nobody else can
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        assert url in refused("chat", url)
    with http.server.HTTPServer(("127.0.0.1", 0), Foreign) as foreign:
        threading.Thread(target=foreign.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{foreign.server_port}"
        assert f"{url} is not an OpenAI-compatible api_server" in refused("chat", url)
        foreign.shutdown()


def test_tunnel_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOGNAME", "ann")
    monkeypatch.setenv("SSH_CONNECTION", "198.51.100.1 50000 192.0.2.7 2222")
    config = ServerConfig(server_name="0.0.0.0", server_port=6007)
    assert tunnel_line(config) == "ssh -CNL 6007:127.0.0.1:6007 ann@192.0.2.7 -p 2222"
    assert local_url(config) == "http://127.0.0.1:6007"
    monkeypatch.delenv("SSH_CONNECTION")
    line = tunnel_line(config)
    assert line == f"ssh -CNL 6007:127.0.0.1:6007 ann@{socket.gethostname()}"


# Real processes


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., AppProcess]]:
    running: list[AppProcess] = []

    def run(*argv: str | Path) -> AppProcess:
        running.append(AppProcess(tmp_path, *argv))
        return running[-1]

    yield run
    for started in running:
        started.kill()


def test_a_model_that_the_engine_process_refuses(start, copy: Path):
    put_nan(copy)
    code, out, err = start("serve", "api_server", copy, "--server-port", "0").wait()
    assert code == 2 and out == ""
    assert "NaN" in only_line(err)


def test_default_port_moves_on_and_both_ends_of_a_key_meet(start, model: Path, tmp_path: Path):
    try:
        taken = socket.create_server(("0.0.0.0", 6006))
    except OSError:
        taken = None  # somebody else has it, which is as good
    try:
        started = start(model, "--server_name", "0.0.0.0")
        text = started.announcement()
    finally:
        if taken:
            taken.close()
    port = int(started.url.rpartition(":")[2])
    assert port != 6006 and f"ssh -CNL {port}:127.0.0.1:{port} " in text

    key = re.search(r"Key +(\S+)", text)
    assert key
    kept = [p for p in tmp_path.rglob("*") if p.is_file() and p.read_bytes() == key[1].encode()]
    assert len(kept) == 1 and stat.S_IMODE(kept[0].stat().st_mode) == 0o600
    models = f"{started.url}/v1/models"
    assert httpx.get(models).status_code == 401
    assert httpx.get(models, headers={"Authorization": f"Bearer {key[1]}"}).status_code == 200

    chat = subprocess.run(  # finds the key
        [sys.executable, "app.py", "chat", f"http://0.0.0.0:{port}", "--max-tokens", "3"],
        cwd=ROOT, env=environment(tmp_path), input="hello\n\nexit\n", text=True,
        capture_output=True, timeout=BOUND_S)
    assert chat.returncode == 0 and "3 tokens" in chat.stdout, chat.stdout + chat.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_server_leaves_no_process_behind(start, model: Path, how: signal.Signals):
    started = start("serve", "api_server", model, "--server-port", "0")
    started.announcement()
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    reply = httpx.post(f"{started.url}/v1/chat/completions", json=body, timeout=BOUND_S)
    assert reply.json()["usage"]["completion_tokens"] == 2
    family = started.family()
    assert len(family) == 2  # the engine, and the process of the chat template
    if how == signal.SIGINT:
        os.killpg(started.pid, how)  # as a terminal does
    else:
        os.kill(started.pid, how)
    code, _, err = started.wait()
    assert_gone(family)
    assert code == (-how if how == signal.SIGKILL else 0)
    assert "Traceback" not in err and "ERROR" not in err


def test_a_reply_that_goes_on_ends_in_an_error(start, model: Path):
    started = start("serve", "api_server", model, "--server-port", "0", "--session-len", "1000000",
                    "--cache-max-entry-count", "20000")
    started.announcement()
    body = {"prompt": "for ever", "stream": True, "ignore_eos": True, "max_tokens": 900_000}
    with httpx.stream("POST", f"{started.url}/v1/completions", json=body, timeout=BOUND_S) as reply:
        lines = reply.iter_lines()
        next(lines)
        os.kill(started.pid, signal.SIGTERM)
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_died"
    code, _, err = started.wait()
    assert code == 0 and "Traceback" not in err


def test_ctrl_c_while_the_model_is_being_loaded(start, model: Path):
    started = start("serve", "api_server", model, "--server-port", "0")
    family = started.family()
    os.killpg(started.pid, signal.SIGINT)
    code, _, err = started.wait()
    assert_gone(family)
    assert code in (0, 130) and "Traceback" not in err


def test_the_end_of_its_input_ends_the_terminal_chat(start, model: Path):
    started = start("chat", model)
    family = started.family()
    code, _, err = started.wait()
    assert_gone(family)
    assert code == 0 and "Traceback" not in err
