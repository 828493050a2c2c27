"""What comes out of a workspace is what went in: every family, rank and number format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from backend.chat_template import ChatTemplate
from backend.config import ChatConfig, EngineConfig, SamplingParams
from backend.engine.inline import ThreadHandle
from backend.engine.types import Request
from backend.engine.worker import build_engine
from backend.engine_manager import LoadRequest
from backend.errors import UserError
from backend.import_bin import import_model
from backend.layers.methods.smoothquant import SmoothQuantMethod
from backend.layers.parallel import ParallelContext
from backend.models.checkpoint import read_checkpoint
from backend.models.loader import check_model, load_model
from backend.services import local_services
from backend.tokenizer import Tokenizer, sampling_defaults
from backend.workspace.convert import convert
from backend.workspace.layout import CONFIG_INI, MANIFEST, STAMP, TOKENIZER, WEIGHTS, verify
from backend.workspace.settings import engine_options
from quantize.preflight import check_source
from tests.family_layouts import FAMILIES as LAYOUTS, make_family
from tests.parity.test_smoothquant import quantized
from tests.tiny_model import FAMILIES, make_checkpoint
from tests.unit.test_awq import WHOLE, edit_config, quantize_checkpoint

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "assets" / "demo_model"
CPU = torch.device("cpu")


@pytest.fixture
def source(tmp_path) -> Path:
    make_checkpoint(tmp_path / "model", "llama")
    return tmp_path / "model"


@pytest.fixture
def workspace(source) -> Path:
    return convert("tiny", source, source.parent / "workspace")


def weights(folder: Path, rank: int = 0, ranks: int = 1, dtype=torch.float32) -> dict:
    decoder, _ = load_model(str(folder), dtype, CPU, ParallelContext(rank, ranks))
    return dict(decoder.named_parameters())


def check_same(source: Path, tp: int = 1, **options) -> Path:
    workspace = convert("tiny", source, source.parent / f"workspace{tp}", tp=tp, **options)
    for rank in range(tp):
        expected, found = weights(source, rank, tp), weights(workspace, rank, tp)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    return workspace


def reply(folder: Path, **options) -> list[int]:
    """Greedy, of the bundled model (or a workspace of it)."""
    tokenizer, template = Tokenizer.from_folder(folder), ChatTemplate.from_folder(folder)
    text = template.render([{"role": "user", "content": "What is the KV cache?"}])
    template.close()
    engine = build_engine(
        EngineConfig(
            model=str(folder), dtype="float32", device="cpu", session_len=128, **options
        )
    )  # fmt: skip
    prompt = tokenizer.encode(text, add_special_tokens=False)
    engine.add_request(Request("0", prompt, SamplingParams(temperature=0.0, max_tokens=12)))
    tokens: list[int] = []
    while engine.has_work():
        for output in engine.step():
            tokens += output.token_ids
    engine.runner.close()
    return tokens


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path, family, tp):
    make_checkpoint(tmp_path / "model", family)
    check_same(tmp_path / "model", tp)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_families_with_other_names(tmp_path, layout, tp):
    make_family(tmp_path / "model", layout)
    check_same(tmp_path / "model", tp)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("keep", [(), ("layers.0.mlp", "layers.1.self_attn")], ids=str)
def test_4_bit_weights(tmp_path, keep, tp):
    make_checkpoint(tmp_path / "model", "llama", attention_bias=True)
    quantize_checkpoint(tmp_path / "model", keep=keep)
    workspace = check_same(tmp_path / "model", tp, model_format="awq", group_size=32)
    names = set(read_checkpoint(str(workspace)))
    assert f"layers.1.feed_forward.w13.{tp - 1}.scales_zeros" in names
    assert "layers.0.attention.w_qkv.0.bias" in names
    text = (workspace / CONFIG_INI).read_text()
    assert "weight_type = int4\n" in text and "group_size = 32\n" in text
    assert "attn_bias = 1\n" in text and f"tensor_para_size = {tp}\n" in text


@pytest.mark.parametrize("tp", [1, 2])
def test_8_bit_weights_and_biases_everywhere(tmp_path, tp, monkeypatch):
    biases = dict(num_key_value_heads=4, attention_bias=True, mlp_bias=True)
    make_checkpoint(tmp_path / "float", "llama", **biases)
    check_same(tmp_path / "float", tp)
    made = quantized(tmp_path / "float", tmp_path / "int8")
    if tp == 2:
        edit_config(made, quantization_config=None)  # its tensors say it, too
    workspace = convert("tiny", made, tmp_path / "made", tp=tp)
    names = {"layers.0.attention.w_qkv.0.scale", f"layers.1.feed_forward.w3.{tp - 1}.bias"}
    assert names <= set(read_checkpoint(str(workspace)))
    assert "weight_type = int8\n" in (workspace / CONFIG_INI).read_text()
    # As loaded: a CPU's own layout cannot be compared.
    monkeypatch.setattr(SmoothQuantMethod, "process_weights_after_loading", lambda *_: None)
    for rank in range(tp):
        expected, found = (weights(folder, rank, tp) for folder in (made, workspace))
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_what_lmdeploy_0_2_wrote(tmp_path):
    """Its auto_awq: .bin files, scales in float32, nothing of it in config.json."""
    old = tmp_path / "old"
    make_checkpoint(old, "llama")
    quantize_checkpoint(old)
    expected = weights(old)
    tensors = load_file(old / WHOLE)
    tensors = {n: t.float() if n.endswith(".scales") else t for n, t in tensors.items()}
    torch.save(tensors, old / "pytorch_model.bin")
    (old / WHOLE).unlink()
    edit_config(old, quantization_config=None)
    import_model(old, tmp_path / "new")
    workspace = convert("tiny", tmp_path / "new", tmp_path / "workspace", model_format="awq",
                        group_size=32)  # fmt: skip
    found = weights(workspace)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert "group_size = 32\n" in (workspace / CONFIG_INI).read_text()


def test_tensors_have_the_tutorials_names(source):
    workspace = convert("tiny", source, source.parent / "two", tp=2)
    layer = {
        *(f"layers.0.attention.{m}.{r}.weight" for m in ("w_qkv", "wo") for r in (0, 1)),
        *(f"layers.0.feed_forward.{m}.{r}.weight" for m in ("w1", "w2", "w3") for r in (0, 1)),
        "layers.0.attention_norm.weight", "layers.0.ffn_norm.weight",
    }  # fmt: skip
    tensors = read_checkpoint(str(workspace))
    assert {name for name in tensors if name.startswith("layers.0.")} == layer
    whole = {name for name in tensors if not name.startswith("layers.")}
    assert whole == {"tok_embeddings.weight", "norm.weight", "output.weight"}
    assert tensors["layers.0.attention.w_qkv.1.weight"].shape == (64, 64)  # half of 64 + 2 * 32


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_number_formats_stay(source, stored):
    tensors = {name: tensor.to(stored) for name, tensor in load_file(source / WHOLE).items()}
    save_file(tensors, source / WHOLE)
    workspace = check_same(source)
    expected = {torch.float16: "F16", torch.bfloat16: "BF16"}[stored]
    assert {info.dtype for info in read_checkpoint(str(workspace)).values()} == {expected}
    norms = {name: tensor.float() for name, tensor in tensors.items() if "norm" in name}
    save_file({**tensors, **norms}, source / WHOLE)
    convert("tiny", source, workspace, overwrite=True)
    assert all(torch.equal(a, b) for a, b in zip(
        weights(source).values(), weights(workspace).values()))  # fmt: skip


def test_the_bundled_model_replies_the_same(tmp_path):
    expected = reply(DEMO)
    convert("demo", DEMO, tmp_path / "made")
    # Moved, and named by its inner folder, as some of the tutorials' commands do.
    workspace = Path(shutil.move(tmp_path / "made", tmp_path / "elsewhere"))
    assert reply(workspace / "triton_models" / "weights") == expected
    assert sampling_defaults(workspace) == sampling_defaults(DEMO)
    options = engine_options(str(workspace), {"session_len": 128})
    assert "tp" in options and "session_len" not in options
    two = convert("demo", DEMO, tmp_path / "two", tp=2)
    assert reply(two, tp=2) == expected
    with pytest.raises(UserError, match="made for tp 2, not 1"):
        check_model(str(two), ParallelContext())
    with pytest.raises(UserError, match="made for tp 2, not 4"):
        engine_options(str(two), {"tp": 4})


def test_services_over_a_workspace(workspace):
    services = local_services(LoadRequest(str(workspace), chat=ChatConfig("tiny")), ThreadHandle)
    assert services.local is not None and services.sampling_defaults == {"temperature": 0.0}
    services.local.template.close()


def test_files_are_hashed_when_they_are_new_and_after_that_when_they_change(workspace):
    count = len(json.loads((workspace / MANIFEST).read_text())["files"])
    assert verify(workspace) == count
    assert verify(workspace) == 0 and verify(workspace, weights=False) == 0
    assert verify(workspace, again=True) == count
    shard = workspace / WEIGHTS / "layers.1.safetensors"
    shard.write_bytes(shard.read_bytes())
    assert verify(workspace) == 1
    (workspace / CONFIG_INI).write_text("[llama]\n")  # which users edit
    assert verify(workspace) == 0
    moved = Path(shutil.copytree(workspace, workspace.parent / "copy"))
    assert verify(moved) == count


@pytest.mark.parametrize("name", [
    f"{WEIGHTS}/layers.1.safetensors", f"{WEIGHTS}/norm.safetensors",
    f"{WEIGHTS}/model.safetensors.index.json", f"{TOKENIZER}/tokenizer.json",
])  # fmt: skip
@pytest.mark.parametrize("damage", ["byte", "size", "missing"])
def test_what_disagrees_with_the_manifest(workspace, name, damage):
    path = workspace / name
    content = bytearray(path.read_bytes())
    weights(workspace)  # found right, and remembered
    if damage == "missing":
        path.unlink()
    else:
        content[-2] ^= 1
        path.write_bytes(bytes(content) if damage == "byte" else bytes(content[:-1]))
    with pytest.raises(UserError, match=path.name):
        verify(workspace)
    with pytest.raises(UserError):
        weights(workspace)


def test_what_was_put_beside_the_tokenizer(workspace):
    (workspace / TOKENIZER / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(UserError, match="chat_template.jinja.*convert did not write it"):
        engine_options(str(workspace), {})


def test_a_workspace_that_cannot_be_written_to(workspace):
    (workspace / STAMP).mkdir()  # as good as read-only
    assert verify(workspace) == verify(workspace) > 0
    assert not list((workspace / WEIGHTS).glob(".verified.*"))


def test_only_a_workspace_is_replaced_and_only_when_told(source, workspace):
    with pytest.raises(UserError, match="exists already.*--overwrite"):
        convert("tiny", source, workspace)
    convert("other", source, workspace, overwrite=True)
    assert "model_name = other\n" in (workspace / CONFIG_INI).read_text()
    own = source.parent / "own"
    own.mkdir()
    (own / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="nothing that this command has made"):
        convert("tiny", source, own, overwrite=True)
    with pytest.raises(UserError, match="the model itself"):
        convert("tiny", source, source, overwrite=True)
    with pytest.raises(UserError, match="is a workspace already"):
        convert("tiny", workspace, source.parent / "again")
    assert sorted(path.name for path in source.parent.iterdir()) == ["model", "own", "workspace"]


def test_nothing_is_left_of_what_fails_and_of_what_was_killed(source):
    target = source.parent / "workspace"
    tensors = load_file(source / WHOLE)
    bad = {**tensors, "model.layers.1.mlp.up_proj.weight": torch.full((128, 64), torch.nan)}
    save_file(bad, source / WHOLE)
    with pytest.raises(UserError, match="layers.1.mlp.up_proj.weight contains NaN"):
        convert("tiny", source, target)
    assert list(source.parent.iterdir()) == [source]
    save_file(tensors, source / WHOLE)
    partial = source.parent / "workspace.partial"
    partial.mkdir()
    (partial / "own.txt").touch()
    with pytest.raises(UserError, match=r"workspace\.partial.*exists"):
        convert("tiny", source, target)
    (partial / ".unfinished").touch()  # what a kill leaves
    check_same(source)
    convert("tiny", source, target)
    assert not partial.exists() and not (target / ".unfinished").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(model_format="awq"), "no 4-bit weights"),
        (dict(group_size=128), "not quantized in groups"),
        (dict(tp=3), "tp 3"),
        (dict(name="a # b"), "no name for a model"),
        (dict(tokenizer_path="nowhere"), "no tokenizer at nowhere"),
    ],
)
def test_what_cannot_be_converted(source, options, words):
    with pytest.raises(UserError, match=words):
        convert(**{"name": "tiny", **options}, model=source, target=source.parent / "workspace")
    assert list(source.parent.iterdir()) == [source]


def test_a_workspace_is_not_quantized(workspace):
    with pytest.raises(UserError, match="quantized before it is converted"):
        check_source(str(workspace))


def test_the_name_chooses_a_template_and_without_one_nobody_chats(source, caplog):
    (source / "tokenizer_config.json").write_text("{}")
    convert("internlm-chat-7b", source, source.parent / "named")
    assert not caplog.records
    (source / "tokenizer.json").write_text(
        (source / "tokenizer.json").read_text().replace("<|im_start|>", "<|other|>")
    )
    convert("tiny", source, source.parent / "base")
    assert "tiny is no chat template's name" in caplog.text


@pytest.mark.parametrize("what", ["folder", "file"])
def test_another_tokenizer(source, what):
    """A folder brings its template, too; a file is another vocabulary for the model's settings."""
    other = source.parent / "other"
    make_checkpoint(other, "llama")
    config = json.loads((other / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ 'other' }}"
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    vocabulary = (other / "tokenizer.json").read_text().replace("<|im_start|>", "<|other|>")
    (other / "tokenizer.json").write_text(vocabulary)
    (source / "vocab.json").write_text("{}")
    path = other if what == "folder" else other / "tokenizer.json"
    workspace = convert("tiny", source, source.parent / "made", tokenizer_path=path)
    assert (ChatTemplate.from_folder(workspace).source == "{{ 'other' }}") == (what == "folder")
    assert Tokenizer.from_folder(workspace).token_to_id("<|other|>") is not None
    names = {entry.name for entry in (workspace / TOKENIZER).iterdir()}
    assert {"generation_config.json", "config.json"} <= names and "vocab.json" not in names
