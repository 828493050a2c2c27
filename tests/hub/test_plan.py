"""What is found out before anything is fetched."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import given, strategies as st

from backend.errors import UserError
from backend.hub.errors import GatedError, HubError, MissingError, OfflineError
from backend.hub.fetch import fetch
from backend.hub.library import models_dir, target_of
from backend.hub.names import checked_path, is_id
from backend.hub.patience import Patience
from backend.hub.plan import Hub, choose, make_plan
from backend.hub.sources import HubFile
from tests.hub.conftest import CHOSEN, ID, WEIGHTS
from tests.stand_in import send, send_json

HASH = "a" * 64
LIST = f"/api/models/{ID}/revision/main"


def listed(*names: str) -> list[HubFile]:
    return [HubFile(name, 10, HASH, "") for name in names]


def chosen(*names: str, **patterns) -> list[str]:
    return [file.path for file in choose(listed(*names), **patterns)]


@pytest.mark.parametrize("source", ["huggingface", "mirror", "modelscope"])
def test_a_plan_tells_files_bytes_and_disk_and_fetches_nothing(stand_in, home, source):
    plan = make_plan(Hub(source, stand_in.url), ID)
    assert [planned.file.path for planned in plan.files] == CHOSEN
    sizes = {planned.file.path: planned.file.size for planned in plan.files}
    assert sizes["model.safetensors"] == WEIGHTS
    assert plan.bytes_to_fetch == plan.total_bytes == sum(sizes.values())
    assert plan.left_out > 2000
    assert plan.commit == stand_in.commit(ID)
    assert plan.target == home / "models" / "space" / "tiny-model"
    assert plan.disk_free > 0 and plan.fits and not plan.complete
    assert not [entry for entry in stand_in.seen if entry[0] == "cdn"]
    assert not home.exists()


def test_a_mirror_that_lists_no_sizes_is_asked_for_the_tree(stand_in):
    full = make_plan(Hub("mirror", stand_in.url), ID)
    stand_in.blobs = False
    tree = make_plan(Hub("mirror", stand_in.url), ID)
    assert (tree.commit, tree.files, tree.left_out) == (full.commit, full.files, full.left_out)
    assert "/tree/" in stand_in.seen[-1][1]


@pytest.mark.parametrize("lack", ["git", "by_commit"])
def test_modelscope_without_commits_is_held_fast_by_its_hashes(stand_in, lack):
    setattr(stand_in, lack, False)
    hub = Hub("modelscope", stand_in.url)
    plan = make_plan(hub, ID)
    assert plan.commit == "" and plan.revision == "master"
    assert all(planned.file.sha256 for planned in plan.files)
    assert fetch(hub, plan).is_dir()


def test_a_revision_has_a_folder_of_its_own(stand_in):
    plan = make_plan(Hub("huggingface", stand_in.url), ID, revision="refs/pr/1")
    assert plan.target == models_dir() / "space" / "tiny-model@refs-pr-1"
    assert "/revision/refs%2Fpr%2F1?" in stand_in.seen[-1][1]


def test_a_target_that_is_something_else_is_left_alone(stand_in, tmp_path):
    (tmp_path / "mine").mkdir()
    hub = Hub("huggingface", stand_in.url)
    make_plan(hub, ID, local_dir=tmp_path / "mine")  # empty: that is what people prepare
    (tmp_path / "mine" / "thesis.txt").write_text("...")
    with pytest.raises(UserError, match="is there already"):
        make_plan(hub, ID, local_dir=tmp_path / "mine")


def test_what_is_chosen():
    assert chosen("model.safetensors", "qwen.tiktoken", "a.py", "b.pt", "chat_template.jinja") == [
        "model.safetensors", "qwen.tiktoken", "chat_template.jinja"]
    # Mistral's second copy; but a model that has only that keeps it.
    assert chosen("model-1.safetensors", "consolidated.safetensors") == ["model-1.safetensors"]
    assert chosen("consolidated.safetensors") == ["consolidated.safetensors"]
    assert chosen("a.bin", "b.bin", "c.json", include=["*.bin"], exclude=["b*"]) == ["a.bin"]
    assert chosen("sub/a.json", "b.json", include=["*"]) == ["sub/a.json", "b.json"]
    assert chosen("a.safetensors", ".git/x", ".gitattributes", include=["*"]) == ["a.safetensors"]
    with pytest.raises(UserError, match="No file"):
        chosen("a.safetensors", include=["*.bin"])


@pytest.mark.parametrize("name, words", [
    ("pytorch_model.bin", "only .bin files. .*python app.py import"),
    ("consolidated.00.pth", "only .pth files. .*python app.py import"),
    ("model.gguf", "only .gguf files. .*GGUF is not loaded"),
    ("README.md", "holds no weights")])
def test_models_without_safetensors_are_told_from_others(name, words):
    with pytest.raises(UserError, match=words):
        chosen(name, "config.json")


@pytest.mark.parametrize("name", [
    "../evil.json", "a/../../evil.json", "/etc/evil.json", "a\\..\\evil.json", "C:evil.json",
    "evil\n.json", "evil.json/..", "a//evil.json", ".. /evil.json", "a./evil.json"])
def test_names_that_lead_elsewhere_refuse_the_model(stand_in, name):
    with pytest.raises(HubError):
        choose(listed("model.safetensors", name), include=["*"])
    if name.endswith(".json") and (".." in name or "/" not in name):
        stand_in.names["config.json"] = name
        with pytest.raises(HubError, match="unusable name"):
            make_plan(Hub("huggingface", stand_in.url), ID)


@given(st.text(alphabet="ab./\\: \n\0", min_size=1, max_size=12))
def test_accepted_paths_stay_in_their_folder(text):
    try:
        checked_path(text)
    except HubError:
        return
    parts = text.split("/")
    assert all(part and part.strip(". ") == part for part in parts)
    assert not set(text) & set("\\:\n\0")


@given(st.text(alphabet="aB1./-_@ \n", max_size=12))
def test_accepted_ids_are_two_names(text):
    if is_id(text):
        assert target_of(text).parent.parent == models_dir()
        assert text.count("/") == 1 and ".." not in text and text == text.strip("./- \n")


@pytest.mark.parametrize("id", ["gpt2", "", "a/b/c", "../a", "a/..", "-a/b", "a/b\n", "a/b?x=1",
                                "https://huggingface.co/a/b", "a/.git", "a b/c", "a/b@main"])
def test_odd_ids_are_refused(stand_in, id):
    with pytest.raises(UserError, match="not the id of a model"):
        make_plan(Hub("huggingface", stand_in.url), id)
    assert not stand_in.seen


@pytest.mark.parametrize("revision", ["../main", "a b", "-x", "a?b", "x" * 300])
def test_odd_revisions_are_refused(stand_in, revision):
    with pytest.raises(UserError, match="not a revision"):
        make_plan(Hub("huggingface", stand_in.url), ID, revision=revision)


def test_sizes_hashes_and_doubles():
    file = HubFile("a.safetensors", 1, "", "")
    with pytest.raises(HubError, match="no checksum"):
        choose([file])
    with pytest.raises(HubError, match="twice"):
        choose(listed("A.safetensors", "a.safetensors"))


@pytest.mark.parametrize("size", [-1, 1.5, True, "7", None, 1 << 60])
def test_sizes_that_are_none(stand_in, size):
    stand_in.answers[LIST] = send_json(200, {"sha": "a" * 40, "siblings": [
        {"rfilename": "model.safetensors", "size": size, "blobId": "b" * 40}]})
    with pytest.raises(HubError, match="lists no size"):
        make_plan(Hub("huggingface", stand_in.url), ID)


# Gated, missing, offline.


def test_a_gated_model_is_told_before_gigabytes_come(stand_in):
    stand_in.gated.add(ID)
    with pytest.raises(GatedError, match="accepted its terms.*HF_TOKEN"):
        make_plan(Hub("huggingface", stand_in.url), ID)
    with pytest.raises(GatedError, match="does not give the model to this token"):
        make_plan(Hub("huggingface", stand_in.url, "hf_wrong"), ID)
    plan = make_plan(Hub("huggingface", stand_in.url, stand_in.token), ID)
    assert plan.bytes_to_fetch > WEIGHTS


def test_missing_models_and_revisions(stand_in):
    hub = Hub("huggingface", stand_in.url)
    with pytest.raises(MissingError, match="no such model, or it is private"):
        make_plan(hub, "space/other")
    with pytest.raises(MissingError, match="not that revision"):
        make_plan(hub, ID, revision="nightly")
    stand_in.private.add(ID)
    with pytest.raises(MissingError):
        make_plan(hub, ID)
    with pytest.raises(MissingError):
        make_plan(Hub("modelscope", stand_in.url), "space/other")
    assert make_plan(Hub("huggingface", stand_in.url, stand_in.token), ID)


def test_a_hub_that_cannot_be_reached(stand_in):
    pauses: list[float] = []
    stand_in.down = True
    patience = Patience(attempts=3, pause=lambda seconds: bool(pauses.append(seconds)))
    with pytest.raises(OfflineError, match="cannot be used now: .*Check the network"):
        make_plan(Hub("huggingface", stand_in.url), ID, patience=patience)
    assert pauses == [1, 2]


def test_a_server_that_asks_for_time_gets_it(stand_in):
    pauses: list[float] = []
    answers = [send(429, "text/plain", b"", Retry_After="7")]

    def answer(handler):
        if answers:
            answers.pop()(handler)
        else:
            stand_in._list(handler, ID, "revision")

    stand_in.answers[LIST] = answer
    patience = Patience(pause=lambda seconds: bool(pauses.append(seconds)))
    assert make_plan(Hub("huggingface", stand_in.url), ID, patience=patience)
    assert pauses == [7]


@pytest.mark.parametrize("body", [
    b"<html>Log in to the hotel</html>", b"[]", b"{}", b"[" * 100_000, b'{"sha": "main"}',
    b'{"sha": "%s", "siblings": 1}' % (b"a" * 40)])
def test_answers_that_are_no_list(stand_in, body):
    stand_in.answers[LIST] = send(200, "application/json", body)
    with pytest.raises(HubError):
        make_plan(Hub("huggingface", stand_in.url), ID)


def test_lists_are_bounded(stand_in, monkeypatch):
    monkeypatch.setattr("backend.hub.connection.MAX_LISTING_BYTES", 1000)
    stand_in.answers[LIST] = send(200, "application/json", b" " * 1001)
    with pytest.raises(HubError, match="too much"):
        make_plan(Hub("huggingface", stand_in.url), ID)


def test_a_plan_sees_what_is_there(stand_in, repository):
    hub = Hub("huggingface", stand_in.url)
    fetch(hub, make_plan(hub, ID))
    plan = make_plan(hub, ID)
    assert plan.complete and plan.bytes_to_fetch == 0
    assert make_plan(Hub("modelscope", stand_in.url), ID).complete  # the same bytes from elsewhere
    (repository / "config.json").write_text("{}")
    plan = make_plan(hub, ID)
    assert not plan.complete and plan.bytes_to_fetch == 2
    shutil.rmtree(plan.target)
    assert make_plan(hub, ID).bytes_to_fetch > WEIGHTS
