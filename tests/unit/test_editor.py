"""Changing a model's settings: what a form changes, the diff, saving, twenty steps back."""

from __future__ import annotations

import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings, strategies as st

from backend.config import EngineConfig
from backend.errors import UserError
from backend.target import BUNDLED_MODEL
from backend.workspace.config_ini import ConfigIni
from backend.workspace.editor import UNDOS, changes_of, digest, draft, save, undo, undos
from backend.workspace.keys import ENGINE_KEYS, KEYS
from backend.workspace.layout import CONFIG_INI, TOKENIZER, Manifest, record
from backend.workspace.settings import SettingsFile, engine_options, settings_of, show
from tests.unit.test_config_ini import LOCKED, TUTORIAL


def make_workspace(root: Path, text: str = TUTORIAL) -> SettingsFile:
    """A workspace as far as config.ini goes: no weights."""
    (root / TOKENIZER).mkdir(parents=True)
    (root / TOKENIZER / "config.json").write_text("{}")
    (root / CONFIG_INI).parent.mkdir()
    (root / CONFIG_INI).write_bytes(text.encode())
    Manifest(1, "fp16", LOCKED, record(root, [f"{TOKENIZER}/config.json"])).write(root)
    return settings_of(root)


@pytest.fixture
def workspace(tmp_path: Path) -> SettingsFile:
    return make_workspace(tmp_path / "workspace")


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SettingsFile:
    monkeypatch.setenv("LMDESK_HOME", str(tmp_path / "home"))
    (tmp_path / "model").mkdir()
    return settings_of(tmp_path / "model")


values = {
    "session_len": st.integers(16, 1 << 20),
    "max_batch_size": st.integers(1, 4096),
    "cache_max_entry_count": st.floats(0.001, 1e6).map(lambda x: round(x, 3) or 0.5),
    "cache_block_seq_len": st.sampled_from(KEYS["cache_block_seq_len"].choices),
    "quant_policy": st.sampled_from((0, 4, 8)),
    "kv_cache_dtype": st.sampled_from(("auto", "int8", "int4")),
    "step_length": st.none(),
}
forms = st.dictionaries(st.sampled_from(sorted(values)), st.none()).flatmap(
    lambda names: st.fixed_dictionaries({name: values[name] for name in names})
)


@settings(max_examples=40, deadline=None)
@given(st.lists(forms, max_size=5), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())
def test_edit_diff_save_undo_returns_the_bytes(edits, end, bom, note):
    text = ("\ufeff" if bom else "") + TUTORIAL.replace("\n", end)
    if note:
        text = text.replace("max_batch_size = 64", "max_batch_size = 64  ; 一次 64 句")
    with TemporaryDirectory() as folder:
        file = make_workspace(Path(folder), text)
        past = []
        for form in edits:
            before = file.path.read_bytes()
            changes = changes_of(file, file.read(), form)
            made = draft(file, changes)
            assert bool(made.diff) == bool(changes) == made.changed
            lines = [line[1:] for line in made.diff.splitlines()[2:] if line[0] in "+-"]
            assert {line.split("=")[0].strip() for line in lines} == set(changes)
            save(file, changes, digest(before.decode()))
            found = file.check(file.read())
            for name, value in form.items():
                default = KEYS[name].default
                assert found.get(name, default) == (default if value is None else value)
            if changes:
                past.append(before)
            else:
                assert file.path.read_bytes() == before
        assert undos(file) == len(past)
        while past:
            undo(file)
            assert file.path.read_bytes() == past.pop()
        assert file.path.read_bytes() == text.encode()


def test_a_form_that_says_what_is_there_changes_nothing(workspace):
    ini = workspace.read()
    form = workspace.check(ini)
    assert changes_of(workspace, ini, form) == {}
    assert changes_of(workspace, ini, {"session_len": 2056.0, "norm_eps": 1e-6}) == {}
    assert changes_of(workspace, ini, {"kv_cache_dtype": "auto", "step_length": None}) == {
        "step_length": ""}  # fmt: skip
    assert draft(workspace, {}).diff == "" and not save(workspace, {}).changed
    assert undos(workspace) == 0


def test_what_the_model_has_by_itself_is_no_change(tmp_path, monkeypatch):
    monkeypatch.setenv("LMDESK_HOME", str(tmp_path))
    file = settings_of(BUNDLED_MODEL)
    own = {"use_logn_attn": False, "session_len": 2048, "rope_scaling_factor": None}
    assert changes_of(file, file.read(), own) == {}
    assert changes_of(file, file.read(), {"use_logn_attn": True, "session_len": 1024}) == {
        "use_logn_attn": "true", "session_len": "1024"}  # fmt: skip


def test_the_diff(workspace):
    made = draft(workspace, {"quant_policy": "4", "step_length": ""})
    assert made.diff.splitlines()[:2] == ["--- config.ini", "+++ config.ini (new)"]
    changed = [line for line in made.diff.splitlines()[2:] if line[0] in "+-"]
    assert changed == ["-step_length = 1", "-quant_policy = 0", "+quant_policy = 4"]


def test_what_is_locked_stays(workspace):
    for name, value in {"head_num": 8, "weight_type": "int4", "rope_theta": None}.items():
        changes = changes_of(workspace, workspace.read(), {name: value, "session_len": 4096})
        with pytest.raises(UserError, match=f"{name} cannot be changed"):
            save(workspace, changes)
    assert workspace.path.read_text() == TUTORIAL


@pytest.mark.parametrize(
    ("name", "value"),
    [("session_len", 4096.5), ("session_len", "4096\nhead_num = 8"), ("max_batch_size", 10**9),
     ("cache_max_entry_count", float("nan")), ("quant_policy", [4]), ("kv_cache_dtype", {"a": 1}),
     ("step_length", "1 # x"), ("max_batch_size", True), ("max_batch_size", "１２ｘ")],
)  # fmt: skip
def test_what_a_client_may_send(workspace, name, value):
    if value is True:  # is 1
        assert changes_of(workspace, workspace.read(), {name: value}) == {name: "1"}
        return
    with pytest.raises(UserError, match=name):
        save(workspace, changes_of(workspace, workspace.read(), {name: value}))
    with pytest.raises(UserError, match="no key"):
        changes_of(workspace, workspace.read(), {"hed_num": value})
    assert workspace.path.read_text() == TUTORIAL


def test_twenty_steps_back_and_no_more(workspace):
    for number in range(UNDOS + 5):
        save(workspace, {"session_len": str(100 + number)})
    assert undos(workspace) == UNDOS
    for number in reversed(range(5, UNDOS + 5)):
        assert workspace.read().values["session_len"] == str(100 + number)
        undo(workspace)
    assert workspace.read().values["session_len"] == "104"
    with pytest.raises(UserError, match="no change to config.ini left"):
        undo(workspace)


def test_nobody_overwrites_what_he_has_not_seen(workspace):
    seen = digest(workspace.read().text)
    save(workspace, {"session_len": "100"}, seen)
    with pytest.raises(UserError, match="somebody else"):
        save(workspace, {"session_len": "200"}, seen)
    workspace.path.write_text(workspace.path.read_text() + "# by hand\n")
    with pytest.raises(UserError, match="edited by other means"):
        undo(workspace)
    save(workspace, {"session_len": "300"})
    undo(workspace)
    assert workspace.path.read_text().endswith("session_len = 100\n# by hand\n") or (
        "session_len = 100" in workspace.path.read_text())  # fmt: skip


def test_a_save_that_was_cut_off_is_no_step(workspace, monkeypatch):
    save(workspace, {"session_len": "100"})

    def killed(ini: ConfigIni) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ConfigIni, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            save(workspace, {"session_len": "200"})
    assert undos(workspace) == 2
    undo(workspace)
    assert workspace.path.read_text() == TUTORIAL


def test_two_at_once_are_one_after_the_other(workspace):
    def work(key: str) -> None:
        for number in range(5):
            save(workspace, {key: str(20 + number)})

    threads = [threading.Thread(target=work, args=(key,))
               for key in ("session_len", "max_batch_size", "step_length")]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert undos(workspace) == 15
    found = workspace.check(workspace.read())
    assert [found[k] for k in ("session_len", "max_batch_size", "step_length")] == [24] * 3


def test_settings_of_a_plain_folder(plain):
    model = plain.model
    assert engine_options(model, {}) == {} and not plain.path.exists()
    assert not save(plain, {}).changed and not plain.path.exists()
    made = save(plain, {"quant_policy": "8", "session_len": "1024", "eager_mode": "yes"})
    assert made.before == "" and "+quant_policy = 8" in made.diff
    expected = {"quant_policy": 8, "session_len": 1024, "eager_mode": True}
    assert engine_options(model, {}) == expected
    assert engine_options(model, {"kv_cache_dtype": "int4"}) == {
        "session_len": 1024, "eager_mode": True}  # fmt: skip
    rows = {row.name: row for row in show(model, {"session_len": 64, "kv_cache_dtype": "int4"})}
    assert (rows["session_len"].value, rows["session_len"].source) == ("64", "--session-len")
    assert (rows["quant_policy"].value, rows["quant_policy"].source) == ("int4", "--kv-cache-dtype")
    assert (rows["eager_mode"].value, rows["eager_mode"].source) == ("true", "settings")
    assert (rows["max_batch_size"].value, rows["max_batch_size"].source) == ("128", "default")
    with pytest.raises(UserError, match="different KV caches"):
        save(plain, {"kv_cache_dtype": "int4"})
    undo(plain)
    assert not plain.path.exists() and engine_options(model, {}) == {}


def test_a_folder_is_the_same_by_any_name(plain, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(plain.model)
    monkeypatch.chdir(tmp_path)
    assert settings_of("link").path == settings_of("./model/").path == plain.path
    assert settings_of(tmp_path).path != plain.path


def test_every_engine_setting_can_be_kept(plain):
    defaults = EngineConfig()
    for name, key in ENGINE_KEYS.items():
        value = getattr(defaults, name)
        if value is not None:
            assert key.parse(key.show(value)) == value
    assert "model" not in ENGINE_KEYS


def test_a_home_that_cannot_be_written_to(plain, tmp_path):
    (tmp_path / "home").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot be changed"):
        save(plain, {"quant_policy": "8"})
    assert engine_options(plain.model, {}) == {}
