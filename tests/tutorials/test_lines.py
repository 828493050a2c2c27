"""Each tutorial from its first line to its last, as somebody types it, on tiny models.

`lines.py` has the lines. Commands run in this process, servers and the Python snippet in one of
their own; models come from a hub on this machine that speaks as the real ones do.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

import app
from backend.workspace.config_ini import read_ini
from backend.workspace.layout import CONFIG_INI
from tests.app_process import BOUND_S, ROOT, AppProcess, environment
from tests.family_layouts import make_family
from tests.stand_in_hub import StandInHub
from tests.tutorials.lines import EXCEPTED, TUTORIALS, Line
from tests.unit.test_awq import quantize_checkpoint

# What a hub has, or a shared disk: by family, and whether it is quantized already.
MODELS = {
    "internlm/internlm-chat-7b": ("internlm_7b", False),
    "internlm/internlm-chat-20b-4bit": ("internlm_20b", True),
    "Qwen/Qwen-7B-Chat": ("qwen", False),
    "shared/EmoLLM": ("internlm2", False),
    "lmdeploy/llama2-chat-7b-w4": ("llama_by_model_type", True),
}
SAME = {  # other names of the first; one of them is a tutorial's typing mistake
    "internlm/ianternlm-chat-7b", "Shanghai_AI_Laboratory/internlm-chat-7b",
}  # fmt: skip
# Wide enough for groups of 128; prompts have a token a byte, and InternLM's begin with 400.
SIZES = dict(hidden_size=128, intermediate_size=256, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandInHub]:
    folders: dict[str, Path] = {}
    for id, (family, awq) in MODELS.items():
        folders[id] = tmp_path_factory.mktemp("models") / id.split("/")[1]
        sizes = {} if family == "qwen" else SIZES  # its config.json is of one size
        make_family(folders[id], family, **sizes)
        if awq:
            quantize_checkpoint(folders[id], group_size=128)
    folders |= {id: folders["internlm/internlm-chat-7b"] for id in SAME}
    with StandInHub(folders) as hub:
        yield hub


class Story:
    """Somebody who works through a tutorial, in an empty folder."""

    def __init__(self, here: Path, hub: StandInHub, capfd: pytest.CaptureFixture[str]) -> None:
        self.here, self.capfd = here, capfd
        self.servers: list[AppProcess] = []
        shared = hub.models["internlm/internlm-chat-7b"]
        self.names = {
            "/root/share/temp/model_repos/internlm-chat-7b/": f"{shared}/",
            "/EmoLLM": str(hub.models["shared/EmoLLM"]),
            "$HF_MODEL": str(shared), "$WORK_DIR": "./work_dir", "$TM_DIR": "./turbomind",
            "$HUB": hub.url, "{ip_addr}": "127.0.0.1", "{port}": "0", "${server_port}": "0",
            "server_name 0.0.0.0": "server_name 127.0.0.1",
            "server-name 0.0.0.0": "server-name 127.0.0.1",
            "server_port 23333": "server_port 0", "server_port 6006": "server_port 0",
        }  # fmt: skip

    def run(self, line: Line) -> None:
        if line.text.startswith("{"):
            self.post(line.text)
        elif line.text.startswith("from lmdeploy"):
            self.run_snippet(line.text)
        else:
            words = line.words(self.names)
            args = vars(app.parse(words))
            name = args["run"].__name__.lstrip("_").removeprefix("run_")
            does: Callable[..., None] = getattr(self, f"do_{name}", self.command)
            does(words, args)

    def command(self, words: list[str], args: dict) -> str:
        """A command that ends by itself."""
        self.capfd.readouterr()
        code = app.main(words)
        out, err = self.capfd.readouterr()
        assert code == 0, err
        return out

    def do_chat(self, words: list[str], args: dict) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO("你好\n\nend\n\nagain\n\nexit\n\nno\n\n"))
            shown = self.command(words, args)
        assert len(re.findall(r"\[prompt \d+ tokens", shown)) == 2, shown
        assert "A new conversation." in shown

    do_api_client = do_chat

    def do_convert(self, words: list[str], args: dict) -> None:
        self.command(words, args)
        ini = read_ini(self.here / args["dst_path"] / CONFIG_INI).values
        assert ini["model_name"] == args["name"]
        assert ini["weight_type"] == ("int4" if args["model_format"] == "awq" else "fp32")

    def do_set(self, words: list[str], args: dict) -> None:
        self.command(words, args)
        ini = read_ini(self.here / args["model"] / CONFIG_INI).values
        for change in args["changes"]:
            key, _, value = change.partition("=")
            assert ini[key] == value

    def do_kv_qparams(self, words: list[str], args: dict) -> None:
        folder = self.here / args["model"]
        folder.mkdir(exist_ok=True)
        self.command(words, args)
        files = self.here / "workspace/triton_models/weights"
        for path in folder.glob("*past_kv_scale*"):
            if folder.name == "private":
                shutil.copy(path, files)
        assert len(list(files.glob("*past_kv_scale*"))) == 2

    def do_auto_awq(self, words: list[str], args: dict) -> None:
        self.command(words, args)
        config = json.loads((self.here / args["work_dir"] / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] in ("awq", "smooth_quant")

    do_smooth_quant = do_auto_awq

    def do_generation(self, words: list[str], args: dict) -> None:
        table = self.command(words, args)
        assert "tokens/s" in table or "tok/s" in table, table

    def do_api_server(self, words: list[str], args: dict) -> None:
        url = self.serve(words)
        port = url.rpartition(":")[2]
        self.names["http://localhost:23333"] = f"http://localhost:{port}"
        self.names["http://0.0.0.0:23333"] = f"http://0.0.0.0:{port}"
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=BOUND_S)
        assert reply.status_code == 200, reply.text
        assert reply.json()["usage"]["completion_tokens"] > 0

    def do_gradio(self, words: list[str], args: dict) -> None:
        url = self.serve(words)
        page = httpx.get(url, timeout=BOUND_S)
        assert page.status_code == 200 and "gradio" in page.text

    def serve(self, words: list[str]) -> str:
        server = AppProcess(self.here, *words, cwd=self.here)
        self.servers.append(server)
        server.announcement()
        return server.url

    def post(self, body: str) -> None:
        url = self.servers[-1].url
        sent = {**json.loads(body), "max_tokens": 8}
        reply = httpx.post(f"{url}/v1/chat/completions", json=sent, timeout=BOUND_S)
        assert reply.status_code == 200, reply.text
        assert reply.json()["choices"][0]["message"]["role"] == "assistant"

    def run_snippet(self, text: str) -> None:
        """In a process of its own, which must end by itself, engine and all."""
        text = text.replace("from lmdeploy import", "from backend import")
        for old, new in self.names.items():
            text = text.replace(old, new)
        (self.here / "snippet.py").write_text(text, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "snippet.py"], cwd=self.here, capture_output=True, text=True,
            env=environment(self.here) | {"PYTHONPATH": str(ROOT)}, timeout=BOUND_S,
        )  # fmt: skip
        assert done.returncode == 0 and done.stdout, done.stderr

    def stop(self) -> None:
        """Ctrl-C for every server, which then ends well."""
        for server in self.servers:
            server.interrupt()
        ends = [server.wait() for server in self.servers]
        assert all(code == 0 for code, _, _ in ends), ends


@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_every_line(tutorial: str, hub: StandInHub, tmp_path: Path, capfd, monkeypatch) -> None:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "LMDEPLOY_USE_MODELSCOPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("LMDESK_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    story = Story(tmp_path, hub, capfd)
    try:
        for line in TUTORIALS[tutorial]:
            try:
                story.run(line)
            except BaseException as error:
                error.add_note(f"{tutorial}, line {line.at}: {line.text}")
                raise
        story.stop()
    finally:
        for server in story.servers:
            server.kill()


def test_every_exception_has_its_reason_and_every_other_translation_too() -> None:
    assert len(TUTORIALS) == 5
    for tutorial, _, text, why in EXCEPTED:
        assert tutorial in TUTORIALS and why, text
    for lines in TUTORIALS.values():
        places = [line.at for line in lines]
        assert places == sorted(set(places))
        assert all(line.why for line in lines if line.instead)
