""".bin files: tensors come out bit for bit, nothing else comes out, and limits hold."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file

import app
from backend import import_bin
from backend.errors import UserError
from backend.import_bin import import_model, parts_of, read_tensors
from backend.layers.parallel import ParallelContext
from backend.models.loader import check_model, load_model
from tests.tiny_model import make_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def made(tmp_path) -> Path:
    """A model with pytorch_model.bin, and code beside it."""
    folder = tmp_path / "old"
    make_checkpoint(folder, "llama")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "modeling_own.py").write_text("raise SystemExit")
    return folder


def split(folder: Path) -> None:
    """Into two shards with an index, as transformers wrote them."""
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        shard = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / "pytorch_model.bin").unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


class Runs:
    """A program in a pickle, such as anybody can put into a .bin file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("shards", [1, 2])
def test_import(made, tmp_path, shards):
    expected = torch.load(made / "pytorch_model.bin", weights_only=True)
    if shards == 2:
        split(made)
    names = import_model(made, tmp_path / "new")
    assert len(names) == shards
    found = {}
    for name in names:
        found |= load_file(tmp_path / "new" / name)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    load_model(str(tmp_path / "new"), torch.float32, CPU, ParallelContext())
    assert not list((tmp_path / "new").glob("*.py")) and not (tmp_path / "new.partial").exists()
    assert (tmp_path / "new" / names[0]).stat().st_mode & 0o777 == 0o644


@given(st.lists(st.integers(0, 40), min_size=1), st.integers(1, 100))
def test_large_files_are_written_in_parts(sizes, bound):
    tensors = {str(n): torch.zeros(size, dtype=torch.uint8) for n, size in enumerate(sizes)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_bin, "PART_BYTES", bound)
        parts = list(parts_of(tensors))
    assert [name for part in parts for name in part] == list(tensors)
    for part in parts:
        assert part and (len(part) == 1 or sum(t.nbytes for t in part.values()) <= bound)


def test_parameters_and_tensors_that_share_memory(made, tmp_path):
    tensors = torch.load(made / "pytorch_model.bin", weights_only=True)
    tensors = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.norm.weight"] = tensors["model.embed_tokens.weight"][0]
    torch.save(tensors, made / "pytorch_model.bin")
    import_model(made, tmp_path / "new")
    found = load_file(tmp_path / "new" / "model.safetensors")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_everywhere_else_they_are_refused_and_the_command_is_named(made, capsys):
    with pytest.raises(UserError, match="can run code") as caught:
        check_model(str(made), ParallelContext())
    assert f"python app.py import {made} " in caught.value.hint
    assert app.main(["import", str(made), str(made.parent / "new")]) == 0
    assert "model.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["object", "list", "nested", "legacy", "text", "cut"])
def test_what_is_no_file_of_tensors(made, content):
    path = made / "pytorch_model.bin"
    tensor = torch.zeros(2)
    match content:
        case "object":
            torch.save({"a": tensor, "epoch": 3}, path)
        case "list":
            torch.save([tensor], path)
        case "nested":
            torch.save({"model": {"a": tensor}}, path)
        case "legacy":
            torch.save({"a": tensor}, path, _use_new_zipfile_serialization=False)
        case "text":
            path.write_text("version https://git-lfs.github.com/spec/v1")
        case "cut":
            path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match="pytorch_model.bin"):
        read_tensors(path)


def test_a_program_is_not_run(made, tmp_path):
    ran = tmp_path / "ran"
    torch.save({"a": torch.zeros(2), "b": Runs(ran)}, made / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin is refused: .*more than tensors"):
        import_model(made, tmp_path / "new")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["old"]


def test_a_file_that_wants_more_memory_than_its_limit(made, tmp_path):
    """A tensor of one element that claims to be a terabyte: strides of 0."""
    huge = torch.zeros(1).expand(1 << 38)
    torch.save({"a": huge}, made / "pytorch_model.bin")
    with pytest.raises(UserError, match="process|refused|memory"):
        import_model(made, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "pytorch_model.bin").unlink(), "has no pytorch_model.bin"),
        (lambda folder: (folder / "model.safetensors").touch(), "nothing need be imported"),
        (lambda folder: shutil.rmtree(folder), "no model folder"),
        (lambda folder: index(folder, '{"weight_map": {"a": "../../x.bin"}}'), "is damaged"),
        (lambda folder: index(folder, '{"weight_map": {"a": "gone.bin"}}'), "has no gone.bin"),
        (lambda folder: index(folder, "["), "is damaged"),
    ],
)
def test_folders_that_are_refused(made, tmp_path, damage, words):
    damage(made)
    with pytest.raises(UserError, match=words):
        import_model(made, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def index(folder: Path, text: str) -> None:
    (folder / "pytorch_model.bin.index.json").write_text(text)


def test_only_a_model_is_replaced_and_only_when_told(made, tmp_path):
    import_model(made, tmp_path / "new")
    with pytest.raises(UserError, match="exists already"):
        import_model(made, tmp_path / "new")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").touch()
    with pytest.raises(UserError, match="nothing that this command has made"):
        import_model(made, tmp_path / "own", overwrite=True)
