"""What becomes of a downloaded folder: updates, additions, losses."""

from __future__ import annotations

import pytest

from backend.errors import UserError
from backend.hub.fetch import fetch
from backend.hub.library import downloads, find, previous_of
from backend.hub.plan import make_plan
from tests.hub.conftest import BIG, ID, contents, stop_midway, wanted


def test_an_update_fetches_what_changed(stand_in, repository, hub, plan):
    folder = fetch(hub, plan)
    (repository / "config.json").write_bytes(b'{"model_type": "qwen2"}')
    (repository / "README.md").unlink()
    (repository / "merges.txt").write_bytes(b"a b\n")
    stand_in.seen.clear()
    with open(folder / "config.json", "rb") as before:  # a server that has it open
        assert fetch(hub, make_plan(hub, ID)) == folder
        assert b"llama" in before.read()
    assert contents(folder) == {name: (repository / name).read_bytes()
                                for name in ("config.json", "merges.txt", BIG, "tokenizer.json")}
    assert not stand_in.fetched(BIG) and stand_in.fetched("config.json")
    assert sorted(path.name for path in folder.parent.iterdir()) == [
        ".tiny-model.lock", "tiny-model"]


def test_an_update_leaves_what_people_added(repository, hub, plan):
    folder = fetch(hub, plan)
    (folder / "notes").mkdir()
    (folder / "notes" / "scales.txt").write_text("mine")
    (repository / "config.json").write_bytes(b'{"model_type": "qwen2"}')
    (repository / "README.md").unlink()
    assert fetch(hub, make_plan(hub, ID)) == folder
    assert (folder / "notes" / "scales.txt").read_text() == "mine"
    assert not (folder / "README.md").exists() and find(ID).manifest.whole


def test_other_patterns_add_to_the_same_version(stand_in, repository, hub, plan):
    fetch(hub, plan)
    stand_in.seen.clear()
    folder = fetch(hub, make_plan(hub, ID, include=["*.bin"]))
    assert contents(folder) == wanted(repository) | {
        "pytorch_model.bin": (repository / "pytorch_model.bin").read_bytes()}
    assert set(find(ID).manifest.files) == set(contents(folder)) and not stand_in.fetched(BIG)


def test_files_of_a_version_given_up_do_not_stay(stand_in, repository, hub, plan):
    stop_midway(stand_in, hub, plan)
    (repository / "README.md").unlink()
    (repository / BIG).write_bytes(b"another")
    folder = fetch(hub, make_plan(hub, ID))
    assert set(contents(folder)) == {"config.json", BIG, "tokenizer.json"}


def test_a_kill_between_two_renames_loses_nothing(stand_in, repository, hub, plan):
    folder = fetch(hub, plan)
    folder.rename(previous_of(folder))
    stand_in.seen.clear()
    assert fetch(hub, plan) == folder
    assert contents(folder) == wanted(repository) and not stand_in.seen


def test_files_lost_or_shortened_afterwards_are_fetched_again(stand_in, repository, hub, plan):
    folder = fetch(hub, plan)
    (folder / "tokenizer.json").unlink()
    (folder / "config.json").write_bytes(b"{")
    assert find(ID) is None and not downloads()
    stand_in.seen.clear()
    assert contents(fetch(hub, make_plan(hub, ID))) == wanted(repository)
    assert not stand_in.fetched(BIG)


@pytest.mark.parametrize("manifest", ["", "[]", "{", '{"files": {"a": 1}}', '{"files": []}'])
def test_a_manifest_that_is_none_counts_as_none(stand_in, hub, plan, manifest):
    folder = fetch(hub, plan)
    (folder / ".download.json").write_text(manifest)
    assert find(ID) is None and not downloads()
    with pytest.raises(UserError, match="is there already, and is no download"):
        make_plan(hub, ID)
