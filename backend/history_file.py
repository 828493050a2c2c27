"""The file that chats are kept in: where it lies, how it is opened, its tables."""

from __future__ import annotations

import os
import platform
import secrets
import sqlite3
from pathlib import Path

from backend.data_dir import data_dir
from backend.errors import UserError

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE server (instance TEXT NOT NULL);
CREATE TABLE chat (
    number INTEGER PRIMARY KEY,
    owner TEXT NOT NULL,
    id TEXT NOT NULL,
    title TEXT NOT NULL,
    system_prompt TEXT NOT NULL,
    sampling TEXT NOT NULL,             -- JSON
    dropped INTEGER NOT NULL DEFAULT 0, -- turns at the beginning that the model no longer gets
    head INTEGER,                       -- the reply that ends the branch in view
    characters INTEGER NOT NULL DEFAULT 0,
    updated REAL NOT NULL,              -- seconds since 1970
    UNIQUE (owner, id)
);
CREATE INDEX chat_age ON chat (owner, updated);
CREATE TABLE message (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    chat INTEGER NOT NULL REFERENCES chat ON DELETE CASCADE,
    parent INTEGER REFERENCES message ON DELETE CASCADE,
    role TEXT NOT NULL,                 -- user, assistant
    content TEXT NOT NULL,
    finish_reason TEXT NOT NULL DEFAULT '',
    stats TEXT                          -- JSON of ReplyStats
);
CREATE INDEX message_chat ON message (chat);
CREATE INDEX message_parent ON message (parent);
CREATE TABLE preset (
    owner TEXT NOT NULL,
    name TEXT NOT NULL,
    system_prompt TEXT NOT NULL,
    sampling TEXT NOT NULL,
    PRIMARY KEY (owner, name)
);
"""
# Three letters at a time: words of Chinese have no spaces between them.
INDEX = """
CREATE VIRTUAL TABLE message_text USING fts5
    (content, content='message', content_rowid='id', tokenize='trigram');
CREATE TRIGGER message_text_add AFTER INSERT ON message BEGIN
    INSERT INTO message_text (rowid, content) VALUES (new.id, new.content); END;
CREATE TRIGGER message_text_delete AFTER DELETE ON message BEGIN
    INSERT INTO message_text (message_text, rowid, content)
    VALUES ('delete', old.id, old.content); END;
"""
PROBE = "CREATE VIRTUAL TABLE temp.probe USING fts5 (x, tokenize='trigram')"


def history_path() -> Path:
    """Where the file lies. The machine's name is in it because home directories may be shared,
    over networks whose file locks SQLite must not rely on.

    Raises:
        UserError: the user has no home directory.
    """
    return data_dir() / f"chats-{platform.node()}.sqlite"


def connect(path: Path | None) -> sqlite3.Connection:
    """A connection to the file, made if it is not there; without a path, to memory.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        if path is not None:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # SQLite gives its other files the mode of this one.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        db = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA foreign_keys = ON")
        return db
    except (OSError, sqlite3.Error) as error:
        raise UserError(f"The chat history {path} cannot be opened: {error}.") from error


def prepare(db: sqlite3.Connection) -> bool:
    """Make the tables in a new file; whether there is an index of the messages' words."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise UserError("The chat history was written by a newer LMDesk.", "Update LMDesk.")
    if version == 0:
        _run_script(db, SCHEMA)
        db.execute("INSERT INTO server VALUES (?)", (secrets.token_hex(4),))
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    has_index = bool(db.execute(
        "SELECT 1 FROM sqlite_master WHERE name = 'message_text_add'").fetchone())
    try:  # not every SQLite has FTS5, nor every FTS5 this tokenizer
        db.execute(PROBE)
    except sqlite3.OperationalError:
        for name in ("add", "delete") if has_index else ():
            db.execute(f"DROP TRIGGER message_text_{name}")
        return False
    db.execute("DROP TABLE temp.probe")
    if not has_index:
        db.execute("DROP TABLE IF EXISTS message_text")
        _run_script(db, INDEX)
        db.execute("INSERT INTO message_text (message_text) VALUES ('rebuild')")
    return True


def _run_script(db: sqlite3.Connection, script: str) -> None:
    """Statements inside the open transaction; `executescript` would end it."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            db.execute(statement)
            statement = ""
