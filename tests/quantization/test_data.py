"""Calibration windows: where the text comes from, what is said of it, and what is refused."""

from __future__ import annotations

import http.server
import json
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

from backend.errors import UserError
from backend.tokenizer import Tokenizer
from quantize import data
from quantize.data import BUNDLED_NAME, DatasetUnavailable, fetch_dataset, load_samples
from tests.tiny_model import write_tokenizer

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo_model"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """One token a byte: what a window says can be read."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.from_folder(folder)


def no_hub(name: str, characters: int) -> str:
    raise DatasetUnavailable("the wire is cut")


def test_bundled_text_of_both_languages_is_the_default_and_seeded():
    tokenizer = Tokenizer.from_folder(DEMO)
    made = load_samples("bundled", tokenizer, 6, 128, seed=1)
    assert made.ids.shape == (6, 128) and made.ids.dtype == torch.int64
    assert made.source == "bundled" and BUNDLED_NAME in made.note
    again = load_samples("bundled", tokenizer, 6, 128, seed=1)
    assert torch.equal(made.ids, again.ids)
    assert not torch.equal(made.ids, load_samples("bundled", tokenizer, 6, 128, seed=2).ids)
    chinese = [
        any("\u4e00" <= char <= "\u9fff" for char in tokenizer.decode(row.tolist()))
        for row in made.ids
    ]
    assert chinese == [False, True] * 3


def test_bundled_text_is_never_held_out(tokenizer, monkeypatch, tmp_path):
    (tmp_path / "en.txt").write_text("a" * 50)
    (tmp_path / "zh_a.txt").write_text("b" * 50)
    (tmp_path / "heldout_en.txt").write_text("c" * 5000)
    monkeypatch.setattr(data, "BUNDLED_FOLDER", tmp_path)
    for source in ("bundled", str(tmp_path)):
        ids = load_samples(source, tokenizer, 4, 20).ids
        assert "c" not in tokenizer.decode(ids.flatten().tolist())


def test_text_file(tokenizer, tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("\ufeffone" * 20 + "\n\n\n" + "二" * 40, encoding="utf-8")
    made = load_samples(str(path), tokenizer, 5, 32)
    assert made.ids.shape == (5, 32)
    assert made.source == str(path) and str(path) in made.note
    assert set(tokenizer.decode(made.ids[0].tolist())) <= set("one\n二\ufeff\ufffd")


def test_jsonl_and_folder(tokenizer, tmp_path):
    rows = [json.dumps({"text": letter * 30, "id": 1}) for letter in "abc"]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "rows.jsonl").write_text("\n".join(rows) + "\n\n")
    (tmp_path / "more.txt").write_text("d" * 30)
    (tmp_path / "image.png").write_bytes(b"\xff\xff")
    for source, letters in (("deep/rows.jsonl", "abc"), (".", "abcd")):
        ids = load_samples(str(tmp_path / source), tokenizer, 40, 20).ids
        assert set(tokenizer.decode(ids.flatten().tolist())) == set(letters + "\n")


def test_windows_begin_as_texts_do(tmp_path):
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [257], "tokens": ["<|im_start|>"]}
        },
    }
    path.write_text(json.dumps(settings))
    described = tmp_path / "tokenizer_config.json"
    described.write_text(
        json.dumps({**json.loads(described.read_text()), "bos_token": "<|im_start|>"})
    )
    (tmp_path / "own.txt").write_text("abc" * 30)
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = load_samples(str(tmp_path / "own.txt"), tokenizer, 3, 16).ids
    assert ids.shape == (3, 16)
    assert ids[:, 0].tolist() == [257] * 3 and not (ids[:, 1:] == 257).any()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("own.txt", b"short", r"has \d+ tokens, too few for one sample of 64"),
        ("own.txt", b" \n\n", "holds no text"),
        ("own.txt", b"\xff\xfe\xfa" * 99, "is not UTF-8"),
        ("own.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2, is no JSON object"),
        ("own.jsonl", b"{", "line 1, is no JSON object"),
        ("own.csv", b"a,b", "neither a .txt nor a .jsonl"),
        ("folder/readme.md", b"a", "holds no .txt or .jsonl"),
    ],
)
def test_refused_text(tokenizer, tmp_path, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    source = path.parent if name.startswith("folder") else path
    with pytest.raises(UserError, match=message):
        load_samples(str(source), tokenizer, 2, 64)


def test_no_such_data(tokenizer):
    with pytest.raises(UserError, match="no calibration data 'wikitext'") as caught:
        load_samples("wikitext", tokenizer, 2, 64)
    assert "wikitext2" in caught.value.hint


@pytest.mark.parametrize(("samples", "seqlen"), [(0, 64), (4, 1)])
def test_nothing_to_calibrate_on(tokenizer, samples, seqlen):
    with pytest.raises(UserError, match="nothing to calibrate on"):
        load_samples("bundled", tokenizer, samples, seqlen)


def test_a_data_set_that_cannot_be_had(tokenizer):
    made = load_samples("c4", tokenizer, 2, 32, fetch=no_hub)
    assert made.source == "bundled"
    assert made.note == (
        "c4 cannot be had here: the wire is cut. "
        "Calibrated on the bundled English and Chinese text instead."
    )
    assert torch.equal(made.ids, load_samples("bundled", tokenizer, 2, 32).ids)
    with pytest.raises(UserError, match="c4 cannot be had here: the wire is cut"):
        load_samples("c4", tokenizer, 2, 32, strict=True, fetch=no_hub)


def test_a_data_set_from_the_hub(tokenizer, monkeypatch):
    asked = {}

    def load_dataset(**arguments):
        asked.update(arguments)
        return ({"text": f"{row:04d}\n"} for row in range(10_000))

    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    try:
        made = load_samples("wikitext2", tokenizer, 3, 20)
    finally:
        thread.join(10)
        server.server_close()
    assert asked["path"] == "Salesforce/wikitext" and asked["streaming"]
    assert made.source == "wikitext2" and "wikitext2" in made.note
    lines = tokenizer.decode(made.ids[0].tolist()).splitlines()[1:-1]
    numbers = [int(line) for line in lines if line]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) and len(numbers) >= 2


def test_a_hub_that_does_not_answer(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=None))
    with pytest.raises(DatasetUnavailable, match="does not answer"):
        fetch_dataset("c4", 100)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetUnavailable, match="datasets is not installed"):
        fetch_dataset("c4", 100)


def test_a_data_set_that_fails_in_the_package(monkeypatch):
    def load_dataset(**arguments):
        raise RuntimeError("Dataset scripts are no longer supported.\nmore")

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DatasetUnavailable, match="scripts are no longer supported$"):
        fetch_dataset("ptb", 100)
