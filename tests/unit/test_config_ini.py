"""config.ini: what keys may be, its text kept to the byte, and who wins: flag, file, default."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

import app
from backend.benchmark.settings import engine_config
from backend.config import EngineConfig
from backend.errors import UserError
from backend.workspace.config_ini import ConfigIni, read_ini
from backend.workspace.editor import save
from backend.workspace.keys import KEYS, write_pages
from backend.workspace.layout import CONFIG_INI, MANIFEST, TOKENIZER, Manifest, record
from backend.workspace.settings import engine_options, model_name, settings_of, show

# As the hands-on tutorial prints it (its section 2.6.2).
TUTORIAL = """\
[llama]
model_name = internlm-chat-7b
tensor_para_size = 1
head_num = 32
kv_head_num = 32
vocab_size = 103168
num_layer = 32
inter_size = 11008
norm_eps = 1e-06
attn_bias = 0
start_id = 1
end_id = 2
session_len = 2056
weight_type = fp16
rotary_embedding = 128
rope_theta = 10000.0
size_per_head = 128
group_size = 0
max_batch_size = 64
max_context_token_num = 1
step_length = 1
cache_max_entry_count = 0.5
cache_block_seq_len = 128
cache_chunk_size = 1
use_context_fmha = 1
quant_policy = 0
max_position_embeddings = 2048
rope_scaling_factor = 0.0
use_logn_attn = 0
"""
LOCKED = {
    name: text
    for name, text in ConfigIni(TUTORIAL, Path("config.ini")).values.items()
    if KEYS[name].locked
}


def edit(workspace: Path, changes: dict[str, str]) -> None:
    save(settings_of(workspace), changes)


word = st.text(st.sampled_from("abcxyz_0189.-+ é漢"), min_size=1).map(str.strip).filter(bool)
blank = st.sampled_from(["", "  ", "\t"])
note = st.sampled_from(["", "  # why; not", " ; 注释", "   "])


@pytest.fixture
def workspace(tmp_path) -> Path:
    """A workspace as far as config.ini goes: no weights."""
    (tmp_path / TOKENIZER).mkdir(parents=True)
    (tmp_path / TOKENIZER / "config.json").write_text("{}")
    (tmp_path / CONFIG_INI).parent.mkdir()
    (tmp_path / CONFIG_INI).write_text(TUTORIAL)
    files = record(tmp_path, [f"{TOKENIZER}/config.json"])
    Manifest(1, "fp16", LOCKED, files).write(tmp_path)
    return tmp_path


def options(workspace: Path, **flags) -> EngineConfig:
    return EngineConfig(**{**engine_options(str(workspace), flags), **flags})


def replace_line(workspace: Path, key: str, line: str) -> None:
    lines = (workspace / CONFIG_INI).read_text().splitlines()
    kept = [line if text.startswith(f"{key} =") else text for text in lines]
    (workspace / CONFIG_INI).write_text("\n".join(kept))


def test_the_docs_have_every_key_as_it_is_in_both_languages(tmp_path):
    root = Path(__file__).resolve().parents[2]
    write_pages(tmp_path, root / "assets" / "locales")
    for page in ("config_ini.md", "config_ini.zh.md"):
        kept = (root / "docs" / page).read_text(encoding="utf-8")
        assert kept == (tmp_path / page).read_text(encoding="utf-8"), "run make docs"
        assert all(f"| `{key}` |" in kept for key in KEYS)


def test_every_key_of_the_tutorials_is_known():
    assert set(ConfigIni(TUTORIAL, Path("config.ini")).values) <= set(KEYS)


lines_of = st.lists(
    st.tuples(word, blank, word, note), unique_by=lambda line: line[0].lower(), max_size=8
)


@given(
    lines_of,
    word, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans(), st.data(),
)  # fmt: skip
def test_setting_changes_one_value_and_no_other_byte(entries, value, end, bom, last_end, data):
    lines = ["# 说明", "[other]", "session_len = 1", "", "[llama]"]
    lines += [f"{indent}{key} = {text}{comment}" for key, indent, text, comment in entries]
    lines += ["[after]", "x: y", "a line of its own"]
    text = ("\ufeff" if bom else "") + end.join(lines) + (end if last_end else "")
    ini = ConfigIni(text, Path("config.ini"))
    assert ini.text == text
    assert ini.values == {key.lower(): entry for key, _, entry, _ in entries}
    names = [key.lower() for key, *_ in entries]
    name = data.draw(st.sampled_from([*names, "a_new_key"]))
    before = dict(ini.values)
    ini.set(name, value)
    again = ConfigIni(ini.text, Path("config.ini"))
    assert again.values == ini.values == {**before, name: value}
    changed = [line for line in ini.text.split(end) if line not in text.split(end)]
    assert len(changed) <= 1
    if name in before:
        ini.set(name, before[name])
        assert ini.text == text
    elif last_end:
        ini.remove(name)
        assert ini.text == text and ini.values == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = 1\n", "no section"),
        ("[llama]\na = 1\nA = 2\n", "twice, in the lines 2 and 3"),
        ("[llama]\nthis is nothing\n", "line 2"),
    ],
)
def test_what_is_no_config_ini(text, words):
    with pytest.raises(UserError, match=words):
        ConfigIni(text, Path("config.ini"))


def test_a_value_cannot_smuggle_in_a_line():
    ini = ConfigIni(TUTORIAL, Path("config.ini"))
    for value in ("1\nhead_num = 2", "1 # x", " 1", "# x"):
        with pytest.raises(UserError, match="session_len cannot be"):
            ini.set("session_len", value)


def test_the_tutorial_s_file_becomes_the_engine_s_options(workspace):
    config = options(workspace)
    assert (config.session_len, config.max_batch_size, config.tp) == (2056, 64, 1)
    assert (config.cache_max_entry_count, config.cache_block_seq_len) == (0.5, 128)
    assert config.max_prefill_token_num == 2056  # max_context_token_num = 1: a whole conversation
    assert config.kv_cache_bits == 0
    assert model_name(str(workspace)) == "internlm-chat-7b"


def test_a_folder_that_is_no_workspace_has_no_options(tmp_path):
    assert engine_options(str(tmp_path), {}) == {} and model_name(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("line", "bits"),
    [("quant_policy = 4", 8), ("quant_policy = 8", 8), ("kv_cache_dtype = int4", 4)],
)
def test_a_flag_wins_over_the_kv_cache_of_the_file(workspace, line, bits):
    edit(workspace, dict([line.split(" = ")]))
    assert options(workspace).kv_cache_bits == bits
    for flags, expected in (
        ({"quant_policy": 0}, 0), ({"quant_policy": 4}, 4), ({"kv_cache_dtype": "int8"}, 8),
    ):  # fmt: skip
        assert options(workspace, **flags).kv_cache_bits == expected


def test_a_benchmark_measures_what_the_file_says(workspace):
    for argv, batch in ((["--inline"], 64), (["--max-batch-size", "8"], 8)):
        args = app.parse(["benchmark", "profile_generation", str(workspace), *argv])
        config = asyncio.run(engine_config(args, 1))
        assert (config.max_batch_size, config.session_len) == (batch, 2056)
        assert config.model == str(workspace) and not config.enable_prefix_caching


def test_flags_win_and_defaults_come_last(workspace):
    config = options(workspace, session_len=100, max_prefill_token_num=32)
    assert (config.session_len, config.max_prefill_token_num) == (100, 32)
    replace_line(workspace, "max_batch_size", "# not said")
    assert options(workspace).max_batch_size == EngineConfig.max_batch_size
    rows = {row.name: row for row in show(workspace, {"session_len": 100, "kv_cache_gb": 1.5})}
    assert (rows["session_len"].value, rows["session_len"].source) == ("100", "--session-len")
    entry = rows["cache_max_entry_count"]
    assert (entry.value, entry.source) == ("1.5", "--kv-cache-gb")
    assert (rows["max_batch_size"].value, rows["max_batch_size"].source) == ("128", "default")
    assert rows["cache_block_seq_len"].source == "config.ini"
    assert set(KEYS) <= set(rows)


@pytest.mark.parametrize(
    ("lines", "tokens"),
    [
        ({"max_context_token_num": 4096}, 4096),
        ({"max_context_token_num": 64}, 64 * 2056),
        ({"max_context_token_num": 4096, "num_tokens_per_iter": 512}, 512),
        ({"num_tokens_per_iter": 3}, 16),
    ],
)
def test_tokens_a_step(workspace, lines, tokens):
    edit(workspace, {key: str(value) for key, value in lines.items()})
    assert options(workspace).max_prefill_token_num == tokens


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("session_len = many", "session_len must be a whole number, not 'many'"),
        ("session_len = 3", "session_len must be at least 16"),
        ("cache_max_entry_count = nan", "cache_max_entry_count must be a number"),
        ("cache_block_seq_len = 100", "must be one of 8, 16, 32"),
        ("quant_policy = 3", "quant_policy must be one of 0, 4, 8"),
        ("head_num = 40", "head_num is 40, but the weights were made with 32"),
        ("weight_type = int4", "weight_type is int4"),
        ("tensor_para_size = 2", "tensor_para_size is 2"),
    ],
)
def test_values_that_are_not_allowed(workspace, line, words):
    replace_line(workspace, line.split()[0], line)
    with pytest.raises(UserError, match=words):
        engine_options(str(workspace), {})


def test_editing(workspace):
    path = workspace / CONFIG_INI
    noted = TUTORIAL.replace("session_len = 2056", "session_len = 2056  # 长度")
    path.write_text(noted + "own = x\n")
    path.chmod(0o640)
    edit(workspace, {"session_len": "4096", "cache_chunk_size": "2", "kv_cache_dtype": "int8"})
    text = path.read_text()
    assert "session_len = 4096  # 长度\n" in text and "own = x\n" in text
    assert text.endswith("own = x\nkv_cache_dtype = int8\n")
    assert path.stat().st_mode & 0o777 == 0o640
    drafts = [p.name for p in path.parent.glob(".config.ini.*")]
    assert drafts == [".config.ini.undo"]
    edit(workspace, {"head_num": "32"})  # what it is already


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_num": "8"}, "head_num cannot be changed"),
        ({"tensor_para_size": "2"}, "convert|Convert"),
        ({"sesion_len": "4096"}, "Did you mean session_len"),
        ({"session_len": "4096", "max_batch_size": "0"}, "max_batch_size must be from 1 to 4096"),
    ],
)
def test_a_bad_edit_changes_nothing(workspace, changes, words):
    with pytest.raises(UserError, match=words):
        edit(workspace, changes)
    assert (workspace / CONFIG_INI).read_text() == TUTORIAL


@pytest.mark.parametrize(
    ("key", "text", "value"), [("rope_scaling_factor", "1.0", 1.0), ("use_logn_attn", "1", True)]
)
def test_long_texts(workspace, key, text, value):
    assert not getattr(options(workspace), key)  # the tutorial's 0 is an off
    edit(workspace, {key: text})
    found = getattr(options(workspace), key)
    assert found == value and type(found) is type(value)
    assert getattr(options(workspace, **{key: type(value)(0)}), key) == 0
    rows = {row.name: row for row in show(workspace, {})}
    assert (rows[key].value, rows[key].source) == (text, "config.ini")
    rows = {row.name: row for row in show(workspace, {key: value})}
    assert (rows[key].value, rows[key].source) == (text, "--" + key.replace("_", "-"))


@pytest.mark.parametrize(
    ("config_json", "factor", "logn"),
    [
        ({}, "0.0", "0"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "2.0", "0"),
        ({"architectures": ["QWenLMHeadModel"], "use_logn_attn": True}, "1.0", "1"),
    ],
)
def test_what_nobody_sets_the_model_says(workspace, config_json, factor, logn):
    demo = Path(__file__).resolve().parents[2] / "assets" / "demo_model" / "config.json"
    path = workspace / TOKENIZER / "config.json"
    path.write_text(json.dumps({**json.loads(demo.read_text()), **config_json}))
    files = record(workspace, [f"{TOKENIZER}/config.json"])
    Manifest(1, "fp16", LOCKED, files).write(workspace)
    for key in ("session_len", "rope_scaling_factor", "use_logn_attn"):
        replace_line(workspace, key, "# not said")
        assert getattr(options(workspace), key) is None
    rows = {row.name: (row.value, row.source) for row in show(workspace, {})}
    assert rows["session_len"] == ("2048", "model")
    assert rows["rope_scaling_factor"] == (factor, "model")
    assert rows["use_logn_attn"] == (logn, "model")


def test_a_file_that_is_not_written_in_utf8(workspace):
    (workspace / CONFIG_INI).write_bytes("[llama]\nmodel_name = 书".encode("gb18030"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_ini(workspace / CONFIG_INI)


def test_a_file_that_was_deleted(workspace):
    (workspace / CONFIG_INI).unlink()
    with pytest.raises(UserError, match="config.ini is missing"):
        engine_options(str(workspace), {})
    (workspace / CONFIG_INI).write_text("[llama]\n")
    assert options(workspace) == EngineConfig()


def test_lmdeploy_s_own_workspaces_are_refused(workspace):
    (workspace / MANIFEST).unlink()
    with pytest.raises(UserError, match="LMDeploy's own"):
        engine_options(str(workspace), {})


@pytest.mark.parametrize("path", ["../config.json", "/etc/passwd", "a\\b", ""])
def test_a_manifest_that_names_foreign_files(workspace, path):
    content = json.loads((workspace / MANIFEST).read_text())
    content["files"][path] = {"bytes": 1, "sha256": "0" * 64}
    (workspace / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(UserError, match="manifest.json is damaged"):
        engine_options(str(workspace), {})
