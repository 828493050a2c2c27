"""The history against a model of dictionaries, with two owners and branching chats."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from backend.history import History, StoredChat, Turn

OWNERS = st.sampled_from(["anna", "bert"])
CHATS = st.sampled_from(["1" * 32, "2" * 32])
TEXTS = st.text(st.sampled_from("abAB键值%_\\\"' "), min_size=1, max_size=6)


@dataclass
class ModelTurn:
    user: str
    reply: str
    parent: int | None


@dataclass
class ModelChat:
    title: str
    turns: dict[int, ModelTurn] = field(default_factory=dict)
    head: int | None = None

    def branch(self) -> list[int]:
        ids, at = [], self.head
        while at is not None:
            ids.append(at)
            at = self.turns[at].parent
        return ids[::-1]


def has(text: str, words: str) -> bool:
    return words.lower() in text.lower()


class Histories(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.tick = 0
        self.store = History(clock=lambda: self.tick)
        self.chats: dict[tuple[str, str], ModelChat] = {}
        self.order: list[tuple[str, str]] = []  # last written last

    def teardown(self) -> None:
        self.store.close()

    @rule(owner=OWNERS, chat_id=CHATS, user=TEXTS, reply=TEXTS, data=st.data())
    def add(self, owner: str, chat_id: str, user: str, reply: str, data: st.DataObject) -> None:
        self.tick += 1
        key = (owner, chat_id)
        chat = self.chats.get(key)
        parents = [None, *chat.turns] if chat else [None]
        parent = data.draw(st.sampled_from(parents))
        reply_id = self.store.add_turn(
            owner, chat_id, parent, Turn(user, reply, "stop"), StoredChat(user))
        if chat is None:
            chat = self.chats[key] = ModelChat(" ".join(user.split()))
        assert reply_id not in chat.turns
        chat.turns[reply_id] = ModelTurn(user, reply, parent)
        chat.head = reply_id
        self.order = [k for k in self.order if k != key] + [key]

    @rule(owner=OWNERS, chat_id=CHATS, data=st.data(), newest=st.booleans())
    def show(self, owner: str, chat_id: str, data: st.DataObject, newest: bool) -> None:
        everything = [i for chat in self.chats.values() for i in chat.turns]
        reply = data.draw(st.sampled_from([None, *everything]))
        self.store.show(owner, chat_id, reply, newest=newest)
        chat = self.chats.get((owner, chat_id))
        if chat is None or reply is not None and reply not in chat.turns:
            return
        while newest and reply is not None:
            below = [i for i, turn in chat.turns.items() if turn.parent == reply]
            if not below:
                break
            reply = max(below)
        chat.head = reply

    @rule(owner=OWNERS, chat_id=CHATS, title=TEXTS)
    def rename(self, owner: str, chat_id: str, title: str) -> None:
        self.store.rename(owner, chat_id, title)
        if chat := self.chats.get((owner, chat_id)):
            chat.title = " ".join(title.split())

    @rule(owner=OWNERS, chat_id=CHATS)
    def delete(self, owner: str, chat_id: str) -> None:
        self.store.delete(owner, chat_id)
        self.chats.pop((owner, chat_id), None)
        self.order = [k for k in self.order if k != (owner, chat_id)]

    @rule(owner=OWNERS, words=TEXTS)
    def search(self, owner: str, words: str) -> None:
        stripped = words.strip()
        expected = [
            chat_id for who, chat_id in reversed(self.order)
            if who == owner and (not stripped or has(self.chats[who, chat_id].title, stripped)
                or any(has(text, stripped) for turn in self.chats[who, chat_id].turns.values()
                       for text in (turn.user, turn.reply)))
        ]
        assert [s.id for s in self.store.summaries(owner, words)] == expected

    @invariant()
    def all_chats_are_as_in_the_model(self) -> None:
        for owner in ("anna", "bert"):
            for chat_id in ("1" * 32, "2" * 32):
                chat, found = self.chats.get((owner, chat_id)), self.store.open(owner, chat_id)
                if chat is None:
                    assert found is None
                    continue
                assert found is not None and found.title == chat.title
                assert [t.id for t in found.turns] == chat.branch()
                for turn in found.turns:
                    model = chat.turns[turn.id]
                    assert (turn.user, turn.reply) == (model.user, model.reply)
                    assert turn.versions == [
                        i for i, other in chat.turns.items() if other.parent == model.parent]


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
