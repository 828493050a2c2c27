"""Chats on disk: what is kept, for whom, and what happens when the disk does not do as told."""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from pathlib import Path

import pytest

from backend import history, history_file
from backend.chat import ReplyStats
from backend.errors import UserError
from backend.history import History, HistoryLimits, Preset, StoredChat, Turn, title_of

ANNA, BERT = "browser:anna", "browser:bert"
CHAT = "a" * 32


def turn(user: str, reply: str = "reply") -> Turn:
    return Turn(user, reply, "stop", ReplyStats(3, 2, 1, 0.5, 20.0))


def talk(store: History, owner: str, chat_id: str, *users: str) -> list[int]:
    """Ids of the replies to a chain of messages."""
    ids: list[int] = []
    for user in users:
        parent = ids[-1] if ids else None
        ids.append(store.add_turn(owner, chat_id, parent, turn(user), StoredChat(users[0])))
    return ids


def users(store: History, owner: str, chat_id: str) -> list[str]:
    chat = store.open(owner, chat_id)
    assert chat is not None
    return [turn.user for turn in chat.turns]


def test_a_chat_is_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "chats.sqlite"
    store = History(path)
    chat = StoredChat("What is\n it? ", "Be brief.", {"temperature": 0.3, "seed": None}, 1)
    first = store.add_turn(ANNA, CHAT, None, turn("What is it?"), chat)
    store.add_turn(ANNA, CHAT, first, turn("And \ud800 then\0?", "<think>hm</think>那"), chat)
    instance = store.instance
    store.close()

    again = History(path)
    assert again.instance == instance
    found = again.open(ANNA, CHAT)
    assert found is not None
    assert (found.title, found.system_prompt, found.dropped) == ("What is it?", "Be brief.", 1)
    assert found.sampling == {"temperature": 0.3, "seed": None}
    assert found.turns == [turn("What is it?"), turn("And ? then\ufffd?", "<think>hm</think>那")]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert {p.stat().st_mode & 0o077 for p in path.parent.iterdir()} == {0}  # WAL and index too


def test_another_owners_chats_do_not_exist() -> None:
    store = History()
    talk(store, ANNA, CHAT, "a secret of Anna's")
    assert store.open(BERT, CHAT) is None
    assert store.summaries(BERT) == [] and store.summaries(BERT, "secret") == []
    store.rename(BERT, CHAT, "mine")
    store.delete(BERT, CHAT)
    store.show(BERT, CHAT, None)
    store.drop_turns(BERT, CHAT, 1)
    talk(store, BERT, CHAT, "the same id")  # is a chat of its own
    assert users(store, BERT, CHAT) == ["the same id"]
    assert users(store, ANNA, CHAT) == ["a secret of Anna's"]
    assert store.open(ANNA, CHAT).title == "a secret of Anna's"


def test_a_branch_cannot_grow_out_of_somebody_elses() -> None:
    store = History()
    [reply] = talk(store, ANNA, CHAT, "Anna's")
    store.add_turn(BERT, CHAT, reply, turn("Bert's"), StoredChat())
    assert users(store, BERT, CHAT) == ["Bert's"]
    store.show(BERT, CHAT, reply)
    assert users(store, BERT, CHAT) == ["Bert's"]


def test_edited_and_regenerated_turns_keep_the_old_branch() -> None:
    store = History()
    one, two, three = talk(store, ANNA, CHAT, "1", "2", "3")
    again = store.add_turn(ANNA, CHAT, one, turn("2", "another reply"), StoredChat())
    edited = store.add_turn(ANNA, CHAT, one, turn("2 edited"), StoredChat())
    chat = store.open(ANNA, CHAT)
    assert [t.user for t in chat.turns] == ["1", "2 edited"]
    assert [t.versions for t in chat.turns] == [[one], [two, again, edited]]
    store.show(ANNA, CHAT, two, newest=True)
    assert [t.id for t in store.open(ANNA, CHAT).turns] == [one, two, three]
    store.show(ANNA, CHAT, two)
    assert [t.id for t in store.open(ANNA, CHAT).turns] == [one, two]
    store.show(ANNA, CHAT, None)
    assert store.open(ANNA, CHAT).turns == []
    assert len(store.summaries(ANNA, "another reply")) == 1


@pytest.mark.parametrize("indexed", [True, False])
def test_search(monkeypatch: pytest.MonkeyPatch, indexed: bool) -> None:
    store = History()
    monkeypatch.setattr(store, "_indexed", indexed and store._indexed)
    talk(store, ANNA, "1" * 32, "What is the KV cache?", "100 % of_it \"quoted\"")
    talk(store, ANNA, "2" * 32, "键值缓存是什么")
    talk(store, ANNA, "3" * 32, "something else")
    store.rename(ANNA, "3" * 32, "Named")

    def found(words: str) -> list[str]:
        return [summary.id[0] for summary in store.summaries(ANNA, words)]

    assert found("kv CACHE") == ["1"] and found("  the KV ") == ["1"]
    assert found("缓存") == ["2"] and found("键值缓存") == ["2"]
    assert found("named") == ["3"] and found("reply") == ["3", "2", "1"]
    for literal in ("100 % of_it", '"quoted"', "%", "_it"):
        assert found(literal) == ["1"], literal
    for nothing in ("ofXit", "\\", "' OR 1", '"', "cache AND", "content:cache", "x" * 5000):
        assert found(nothing) == ([] if nothing != '"' else ["1"]), nothing
    store.delete(ANNA, "1" * 32)
    assert found("KV cache") == []


def test_without_fts5_and_with_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python with another SQLite may open the same file."""
    path = tmp_path / "chats.sqlite"
    store = History(path)
    talk(store, ANNA, "1" * 32, "before the change")
    store.close()
    real = history_file.PROBE
    monkeypatch.setattr(history_file, "PROBE", real.replace("fts5", "no_such_module"))
    poor = History(path)
    talk(poor, ANNA, "2" * 32, "written without index")
    poor.delete(ANNA, "1" * 32)
    assert [s.id[0] for s in poor.summaries(ANNA, "without index")] == ["2"]
    poor.close()
    monkeypatch.setattr(history_file, "PROBE", real)
    rich = History(path)
    assert [s.id[0] for s in rich.summaries(ANNA, "without index")] == ["2"]
    assert rich.summaries(ANNA, "before the change") == []


def test_pages_of_the_list_are_newest_first() -> None:
    now = iter(range(100))
    store = History(clock=lambda: next(now))
    for number in range(5):
        talk(store, ANNA, f"{number}" * 32, f"chat {number}")
    assert [s.title for s in store.summaries(ANNA, limit=2)] == ["chat 4", "chat 3"]
    assert [s.title for s in store.summaries(ANNA, limit=2, offset=4)] == ["chat 0"]
    talk(store, ANNA, "0" * 32, "written to again")
    assert store.summaries(ANNA, limit=1)[0].title == "chat 0"


def test_the_oldest_go_when_there_are_too_many() -> None:
    store = History(limits=HistoryLimits(chats_per_owner=2, chats=3, characters=10_000))
    for number in range(4):
        talk(store, ANNA, f"{number}" * 32, f"anna {number}")
    assert [s.title for s in store.summaries(ANNA)] == ["anna 3", "anna 2"]
    talk(store, BERT, "0" * 32, "bert 0")
    talk(store, BERT, "1" * 32, "bert 1")
    assert [s.title for s in store.summaries(ANNA)] == ["anna 3"]  # three of all owners' stay
    talk(store, BERT, "1" * 32, "x" * 20_000)  # over the limit by itself: stays, alone
    assert [s.id[0] for s in store.summaries(BERT)] == ["1"]
    assert store.summaries(ANNA) == []


def test_presets() -> None:
    store = History(limits=HistoryLimits(presets_per_owner=2))
    assert store.save_preset(ANNA, "b", "Be brief.", {"top_p": 0.5})
    assert store.save_preset(ANNA, "a", "", {})
    assert store.save_preset(ANNA, "b", "Be short.", {"top_p": 0.6})
    assert not store.save_preset(ANNA, "c", "", {})
    assert store.presets(ANNA) == [Preset("a", "", {}), Preset("b", "Be short.", {"top_p": 0.6})]
    assert store.presets(BERT) == []
    store.delete_preset(BERT, "a")
    store.delete_preset(ANNA, "a")
    assert [preset.name for preset in store.presets(ANNA)] == ["b"]


def test_titles_are_one_short_line() -> None:
    assert title_of(" a\n\tb ") == "a b"
    assert len(title_of("x" * 500)) == 80 and title_of("x" * 500).endswith("…")


def test_threads_and_processes_share_the_file(tmp_path: Path) -> None:
    path = tmp_path / "chats.sqlite"
    stores = [History(path), History(path)]

    def write(number: int) -> None:
        talk(stores[number % 2], ANNA, f"{number}" * 32, *"abcde")

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(users(stores[0], ANNA, f"{n}" * 32) == [*"abcde"] for n in range(4))


def test_what_is_no_history_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "chats.sqlite"
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(UserError, match="file is not a database"):
        History(path)
    assert path.read_bytes().startswith(b"no database")
    newer = tmp_path / "newer.sqlite"
    History(newer).close()
    with sqlite3.connect(newer) as db:
        db.execute(f"PRAGMA user_version = {history_file.SCHEMA_VERSION + 1}")
    with pytest.raises(UserError, match="newer LMDesk"):
        History(newer)


def test_a_full_disk_is_a_sentence_and_loses_nothing(tmp_path: Path) -> None:
    store = History(tmp_path / "chats.sqlite")
    [first] = talk(store, ANNA, CHAT, "kept")
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(UserError, match="database or disk is full"):
        store.add_turn(ANNA, CHAT, first, turn("x" * 1_000_000), StoredChat())
    assert users(store, ANNA, CHAT) == ["kept"]
    store._db.execute("PRAGMA max_page_count = 100000")
    store.add_turn(ANNA, CHAT, first, turn("room again"), StoredChat())
    assert users(store, ANNA, CHAT) == ["kept", "room again"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be opened"):
        History(tmp_path / "chats.sqlite")


def test_without_a_file_the_page_still_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "chats.sqlite"
    path.write_bytes(b"damaged " * 100)
    monkeypatch.setattr(history, "history_path", lambda: path)
    store = history.open_history()
    talk(store, ANNA, CHAT, "in memory")
    assert users(store, ANNA, CHAT) == ["in memory"]
    assert "not kept beyond this run" in caplog.text and str(path) not in store.instance
