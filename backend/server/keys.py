"""Keys, and the signed passes that prove that somebody had one."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

from backend.classroom import Caller, Role

_SIGNED = re.compile(r"([\w-]{0,400})\.([0-9a-f]{32}|)\.([0-9a-f]{64})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Pass:
    """What somebody came in with.

    Attributes:
        key: the key's number.
        name: what its holder is called.
        person: random; tells apart the people who share a key. "" where that is not known: a
            program with the key itself, or a server that is no class.
    """

    key: int
    name: str = ""
    person: str = ""


class Keys:
    """The accepted keys, as digests.

    A pass is signed with a secret that is made of its key, and of the hosts' keys: it survives a
    restart and ends with the key, and students cannot make one. Whoever is in the class is known
    by a random number in it, so that to take another's name is not to take his place.

    Args:
        api_keys: of everybody; with `host_keys`, of students.
        host_keys: of hosts.
    """

    def __init__(self, api_keys: tuple[str, ...], host_keys: tuple[str, ...] = ()) -> None:
        self.for_class = bool(host_keys)
        keys = (*api_keys, *host_keys)
        self._first_host = len(api_keys) if host_keys else 0
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        salt = " ".join(("lmdesk pass", *host_keys)).encode()  # no key has a blank
        self._secrets = [hmac.digest(key.encode(), salt, "sha256") for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def find(self, key: str) -> Pass | None:
        """Whose key or signed pass it is, in a time that does not tell how nearly it is one."""
        digest = hashlib.sha256(key.encode("utf-8", errors="replace")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return Pass(matches.index(True)) if True in matches else self.find_signed(key)

    def find_signed(self, text: str) -> Pass | None:
        """The pass, if one of our keys signed it."""
        match = _SIGNED.fullmatch(text)
        # The pass of a class is none where there is no class, and the other way round.
        if match is None or {bool(match[1]), bool(match[2])} != {self.for_class}:
            return None
        signatures = [_signature(secret, match[1], match[2]) for secret in self._secrets]
        matches = [hmac.compare_digest(match[3], known) for known in signatures]
        if True not in matches:
            return None
        name = base64.urlsafe_b64decode(match[1] + "=" * (-len(match[1]) % 4)).decode()
        return Pass(matches.index(True), name, match[2])

    def signed(self, entered: Pass) -> str:
        """The pass as a cookie or a bearer's key."""
        name = base64.urlsafe_b64encode(entered.name.encode()).decode().rstrip("=")
        signature = _signature(self._secrets[entered.key], name, entered.person)
        return f"{name}.{entered.person}.{signature}"

    def enter(self, found: Pass, name: str = "", before: Pass | None = None) -> Pass:
        """The pass of somebody who brought the key of `found`; a guest if there is no name.

        Args:
            before: what they were until now: they stay the same person, if the key is the same.
        """
        if not self.for_class:
            return Pass(found.key)
        again = next((p for p in (before, found) if p and p.person and p.key == found.key), None)
        person = again.person if again else secrets.token_hex(16)
        return Pass(found.key, name or (again.name if again else f"guest-{person[:4]}"), person)

    def caller(self, found: Pass) -> Caller:
        """Who that is."""
        digest = self._digests[found.key]
        id = hashlib.sha256(digest + bytes.fromhex(found.person)) if found.person else None
        role = Role.HOST if found.key >= self._first_host else Role.STUDENT
        return Caller(id.hexdigest() if id else digest.hex(), found.name, role)


def key_id(key: str) -> str:
    """The `Caller.id` of who sends this key itself."""
    return hashlib.sha256(key.encode()).hexdigest()


def _signature(secret: bytes, name: str, person: str) -> str:
    return hmac.digest(secret, f"{name}.{person}".encode(), "sha256").hex()
