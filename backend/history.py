"""Chats on disk: one SQLite file for a user of the machine, a row for every message.

Every call names an owner, and reaches that owner's chats only: an id of somebody else's chat is an
id that does not exist. Messages form a tree by their parents, so that an edited or regenerated turn
leaves the old one in place; a chat's `head` is the end of the branch in view.

Calls block for as long as the disk does; event loops call them in threads.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from backend.chat import ReplyStats
from backend.errors import UserError
from backend.history_file import connect, history_path, prepare

logger = logging.getLogger(__name__)

MIN_INDEXED = 3  # letters; shorter words are searched without the index
MAX_TITLE, MAX_SEARCH, MAX_PRESET_NAME = 80, 200, 60


@dataclass(slots=True, frozen=True)
class HistoryLimits:
    """What is kept; beyond it, the chats that were longest not written to go first, as wholes."""

    chats_per_owner: int = 1000
    chats: int = 50_000
    characters: int = 1_000_000_000
    presets_per_owner: int = 100


@dataclass(slots=True)
class Turn:
    """A finished exchange. `finish_reason` is the engine's, or "stopped" or "failed".

    Attributes:
        id: of the reply's row; None until it is saved.
        versions: ids of all replies that stand in this place of the chat, oldest first.
    """

    user: str
    reply: str
    finish_reason: str
    stats: ReplyStats | None = None
    id: int | None = field(default=None, compare=False)
    versions: list[int] = field(default_factory=list, compare=False)


@dataclass(slots=True)
class StoredChat:
    """A chat with the branch in view."""

    title: str = ""
    system_prompt: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    dropped: int = 0
    turns: list[Turn] = field(default_factory=list)


@dataclass(slots=True, frozen=True)
class Summary:
    """A chat in a list."""

    id: str
    title: str
    updated: float


@dataclass(slots=True, frozen=True)
class Preset:
    """A system prompt and sampling settings under a name."""

    name: str
    system_prompt: str
    sampling: dict[str, Any]


class History:
    """The store.

    Args:
        path: the file; None keeps everything in memory, until the process ends.
        clock: seconds since 1970.

    Raises:
        UserError: the file cannot be opened, is no history, or is of a newer LMDesk.
    """

    def __init__(
        self,
        path: Path | None = None,
        limits: HistoryLimits | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.limits = limits or HistoryLimits()
        self._clock = clock
        self._lock = threading.Lock()
        self._db = connect(path)
        with self._transaction():
            self._indexed = prepare(self._db)
            self.instance: str = self._db.execute("SELECT instance FROM server").fetchone()[0]

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, one at a time, also among processes."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:  # a full disk has ended it already
                        self._db.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise UserError(
                    f"The chat history cannot be used: {error}.",
                    "Is the disk full, or the file not writable?") from error

    # Chats

    def summaries(
        self, owner: str, search: str = "", limit: int = 30, offset: int = 0
    ) -> list[Summary]:
        """The owner's chats, last written first; with `search`, those that have these words."""
        search = _clean(search).strip()[:MAX_SEARCH]
        where, values = "owner = ?", [owner]
        if search:
            pattern = "%" + "".join("\\" + c if c in "\\%_" else c for c in search) + "%"
            if self._indexed and len(search) >= MIN_INDEXED:
                found = "id IN (SELECT rowid FROM message_text WHERE message_text MATCH ?)"
                words = '"' + search.replace('"', '""') + '"'
            else:
                found, words = "content LIKE ? ESCAPE '\\'", pattern
            where += (" AND (title LIKE ? ESCAPE '\\' OR EXISTS "
                      f"(SELECT 1 FROM message WHERE chat = number AND {found}))")
            values += [pattern, words]
        with self._transaction() as db:
            rows = db.execute(
                f"SELECT id, title, updated FROM chat WHERE {where} "
                "ORDER BY updated DESC, number DESC LIMIT ? OFFSET ?", (*values, limit, offset))
            return [Summary(*row) for row in rows]

    def open(self, owner: str, chat_id: str) -> StoredChat | None:
        """A chat with the turns of its branch in view; None if the owner has none of that id."""
        with self._transaction() as db:
            row = db.execute(
                "SELECT title, system_prompt, sampling, dropped, number, head FROM chat "
                "WHERE owner = ? AND id = ?", (owner, chat_id)).fetchone()
            if row is None:
                return None
            *settings, number, head = row
            turns = _branch(db, number, head)
        title, system_prompt, sampling, dropped = settings
        return StoredChat(title, system_prompt, json.loads(sampling), dropped, turns)

    def add_turn(
        self, owner: str, chat_id: str, parent: int | None, turn: Turn, chat: StoredChat
    ) -> int:
        """Save a turn after the reply `parent` (None: at the beginning) and show its branch.

        Args:
            chat: its settings are saved, too; its title only names a new chat.

        Returns:
            The id of the reply's row.

        Raises:
            UserError: it cannot be saved.
        """
        user, reply = _clean(turn.user), _clean(turn.reply)
        stats = json.dumps(asdict(turn.stats)) if turn.stats else None
        with self._transaction() as db:
            number = self._write_chat(db, owner, chat_id, chat)
            if parent is not None and not _is_message(db, number, parent):
                parent = None  # deleted meanwhile, in another tab
            row = db.execute(
                "SELECT id FROM message WHERE chat = ? AND parent IS ? AND role = 'user' "
                "AND content = ?", (number, parent, user)).fetchone()
            if row:  # a regenerated reply: another answer to the same message
                asked = row[0]
            else:
                asked = db.execute(
                    "INSERT INTO message (chat, parent, role, content) VALUES (?, ?, 'user', ?)",
                    (number, parent, user)).lastrowid
            added = db.execute(
                "INSERT INTO message (chat, parent, role, content, finish_reason, stats) "
                "VALUES (?, ?, 'assistant', ?, ?, ?)",
                (number, asked, reply, turn.finish_reason, stats)).lastrowid
            size = len(reply) + (0 if row else len(user))
            db.execute("UPDATE chat SET head = ?, characters = characters + ? WHERE number = ?",
                       (added, size, number))
            self._trim(db, owner, number)
        assert added is not None
        return added

    def show(self, owner: str, chat_id: str, reply: int | None, *, newest: bool = False) -> None:
        """Make the branch that ends with `reply` the one in view; None: before the first turn.

        With `newest`, the branch goes on below that reply, along the last written turns.
        """
        with self._transaction() as db:
            number = _number(db, owner, chat_id)
            if number is None or reply is not None and not _is_message(db, number, reply):
                return
            while newest and reply is not None and (row := db.execute(
                    "SELECT max(a.id) FROM message a JOIN message u ON a.parent = u.id "
                    "WHERE u.parent = ?", (reply,)).fetchone())[0]:
                reply = row[0]
            db.execute("UPDATE chat SET head = ? WHERE number = ?", (reply, number))

    def drop_turns(self, owner: str, chat_id: str, dropped: int) -> None:
        """How many turns at the beginning the model no longer gets."""
        with self._transaction() as db:
            db.execute("UPDATE chat SET dropped = ? WHERE owner = ? AND id = ?",
                       (dropped, owner, chat_id))

    def rename(self, owner: str, chat_id: str, title: str) -> None:
        with self._transaction() as db:
            db.execute("UPDATE chat SET title = ? WHERE owner = ? AND id = ?",
                       (title_of(title), owner, chat_id))

    def delete(self, owner: str, chat_id: str) -> None:
        """Forget a chat with all its branches."""
        with self._transaction() as db:
            db.execute("DELETE FROM chat WHERE owner = ? AND id = ?", (owner, chat_id))

    def _write_chat(
        self, db: sqlite3.Connection, owner: str, chat_id: str, chat: StoredChat
    ) -> int:
        values = (_clean(chat.system_prompt), json.dumps(chat.sampling), chat.dropped)
        now = self._clock()
        number = _number(db, owner, chat_id)
        if number is None:
            added = db.execute(
                "INSERT INTO chat (owner, id, title, system_prompt, sampling, dropped, updated) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (owner, chat_id, title_of(chat.title), *values, now)).lastrowid
            assert added is not None
            return added
        db.execute("UPDATE chat SET system_prompt = ?, sampling = ?, dropped = ?, updated = ? "
                   "WHERE number = ?", (*values, now, number))
        return number

    def _trim(self, db: sqlite3.Connection, owner: str, number: int) -> None:
        """Forget what is beyond the limits; never the chat `number`, which was written just now."""
        limits = self.limits
        oldest = "DELETE FROM chat WHERE number != :keep AND number IN (SELECT number FROM "
        values = {"keep": number, "owner": owner, "each": limits.chats_per_owner,
                  "all": limits.chats, "characters": limits.characters}
        db.execute(oldest + "chat WHERE owner = :owner ORDER BY updated DESC, number DESC "
                   "LIMIT -1 OFFSET :each)", values)
        chats, characters = db.execute("SELECT count(*), sum(characters) FROM chat").fetchone()
        if chats > limits.chats:
            db.execute(oldest + "chat ORDER BY updated DESC, number DESC LIMIT -1 OFFSET :all)",
                       values)
        if characters > limits.characters:
            db.execute(oldest + "(SELECT number, sum(characters) OVER (ORDER BY updated DESC, "
                       "number DESC) AS so_far FROM chat) WHERE so_far > :characters)", values)

    # Presets

    def presets(self, owner: str) -> list[Preset]:
        """The owner's own, by name."""
        with self._transaction() as db:
            rows = db.execute("SELECT name, system_prompt, sampling FROM preset WHERE owner = ? "
                              "ORDER BY name", (owner,)).fetchall()
        return [Preset(name, prompt, json.loads(sampling)) for name, prompt, sampling in rows]

    def save_preset(
        self, owner: str, name: str, system_prompt: str, sampling: Mapping[str, Any]
    ) -> bool:
        """Save one, over the one of that name; False if the owner has too many already."""
        with self._transaction() as db:
            mine = {row[0] for row in
                    db.execute("SELECT name FROM preset WHERE owner = ?", (owner,))}
            if name not in mine and len(mine) >= self.limits.presets_per_owner:
                return False
            db.execute("INSERT OR REPLACE INTO preset VALUES (?, ?, ?, ?)",
                       (owner, _clean(name), _clean(system_prompt), json.dumps(dict(sampling))))
        return True

    def delete_preset(self, owner: str, name: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM preset WHERE owner = ? AND name = ?", (owner, name))


def open_history() -> History:
    """The user's history; if it cannot be opened, one in memory, and the log says why."""
    try:
        return History(history_path())
    except UserError as error:
        logger.warning("Chats are not kept beyond this run. %s", error)
        return History()


def title_of(text: str) -> str:
    """A chat's name by its first message: one line, not too long."""
    line = " ".join(_clean(text).split())
    return line if len(line) <= MAX_TITLE else line[: MAX_TITLE - 1] + "…"


def _clean(text: str) -> str:
    """Text that SQLite keeps whole: without NUL and halves of surrogate pairs."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")


def _number(db: sqlite3.Connection, owner: str, chat_id: str) -> int | None:
    row = db.execute(
        "SELECT number FROM chat WHERE owner = ? AND id = ?", (owner, chat_id)).fetchone()
    return row[0] if row else None


def _is_message(db: sqlite3.Connection, number: int, message: int) -> bool:
    found = db.execute("SELECT 1 FROM message WHERE chat = ? AND id = ?", (number, message))
    return found.fetchone() is not None


def _branch(db: sqlite3.Connection, number: int, head: int | None) -> list[Turn]:
    """The turns up to the reply `head`, each with the versions of its place."""
    rows = db.execute(
        "SELECT a.id, u.parent, u.content, a.content, a.finish_reason, a.stats FROM message a "
        "JOIN message u ON a.parent = u.id WHERE a.chat = ? AND a.role = 'assistant' "
        "ORDER BY a.id", (number,)).fetchall()
    by_id = {row[0]: row for row in rows}
    versions: dict[int | None, list[int]] = {}
    for row in rows:
        versions.setdefault(row[1], []).append(row[0])
    turns: list[Turn] = []
    while head in by_id:
        reply_id, parent, user, reply, reason, stats = by_id[head]
        turns.append(Turn(user, reply, reason, ReplyStats(**json.loads(stats)) if stats else None,
                          reply_id, versions[parent]))
        head = parent
    return turns[::-1]
