"""config.ini as text: values are read and replaced, all else stays as it is, to the byte."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from pathlib import Path

from backend.errors import UserError

SECTION = "llama"
MAX_BYTES = 1 << 20
_HEADER = re.compile(r"\s*\[([^\]]*)\]\s*(?:[#;].*)?")
# indentation and key and "=", value, blanks and a comment
_ENTRY = re.compile(r"(\s*([^\s=:#;\[][^=:]*?)\s*[=:][ \t]*)(.*?)(\s*|\s+[#;].*)")


class ConfigIni:
    """The lines of a config.ini, and the values in its section.

    Args:
        text: of the file.
        path: for messages, and where `write` writes to.
        section: the one that counts; all others are kept as they are.

    Attributes:
        values: key -> text after the "=", without a comment.

    Raises:
        UserError: no such section, a key twice, or a line that is nothing.
    """

    def __init__(self, text: str, path: Path, section: str = SECTION) -> None:
        self.path = path
        self.section = section
        self._lines = re.split(r"(?<=\n)", text)  # not splitlines: it parts at U+2028 and others
        self._at: dict[str, int] = {}
        self.values: dict[str, str] = {}
        current, found = "", False
        for number, line in enumerate(self._lines):
            content = line.rstrip("\r\n").removeprefix("\ufeff")
            if not content.strip() or content.lstrip()[0] in "#;":
                continue
            if header := _HEADER.fullmatch(content):
                current = header[1].strip()
                found = found or current == section
            elif current == section:
                self._read_entry(number, content)
        if not found:
            raise UserError(f"{path} has no section [{section}].", "Its keys belong under it.")

    def _read_entry(self, number: int, content: str) -> None:
        entry = _ENTRY.fullmatch(content)
        if entry is None:
            raise UserError(
                f"{self.path}, line {number + 1}: {content.strip()!r:.80} is no `key = value`."
            )
        key = entry[2].lower()
        if key in self.values:
            raise UserError(
                f"{self.path} has {key} twice, in the lines {self._at[key] + 1} and {number + 1}.",
                "Delete one of them.",
                field=key,
            )
        self.values[key], self._at[key] = entry[3], number

    def set(self, key: str, value: str) -> None:
        """Replace a key's value, or add the key behind the section's last one."""
        if re.search(r"[\r\n]|^\s|\s$|(^|\s)[#;]", value):
            raise UserError(f"{key} cannot be {value!r:.80}.", field=key)
        if key in self._at:
            number = self._at[key]
            line = self._lines[number]
            content = line.rstrip("\r\n")
            bom = "\ufeff" if content.startswith("\ufeff") else ""
            entry = _ENTRY.fullmatch(content.removeprefix("\ufeff"))
            assert entry is not None
            self._lines[number] = bom + entry[1] + value + entry[4] + line[len(content) :]
        else:
            self._insert(key, value)
        self.values[key] = value

    def _insert(self, key: str, value: str) -> None:
        after = max(self._at.values(), default=None)
        if after is None:
            after = next(
                number for number, line in enumerate(self._lines)
                if (header := _HEADER.fullmatch(line.rstrip("\r\n").removeprefix("\ufeff")))
                and header[1].strip() == self.section
            )
        end = "\r\n" if self._lines[after].endswith("\r\n") else "\n"
        if not self._lines[after].endswith("\n"):
            self._lines[after] += end
        self._lines.insert(after + 1, f"{key} = {value}{end}")
        self._at = {name: at + (at > after) for name, at in self._at.items()}
        self._at[key] = after + 1

    def remove(self, key: str) -> None:
        """Take a key's line out, if it has one; then its default counts."""
        number = self._at.pop(key, None)
        if number is None:
            return
        del self.values[key]
        del self._lines[number]
        self._at = {name: at - (at > number) for name, at in self._at.items()}

    @property
    def text(self) -> str:
        """The whole file."""
        return "".join(self._lines)

    def write(self) -> None:
        """Replace the file: at every moment it is the old one or the new one.

        Raises:
            UserError: it cannot be written.
        """
        draft = None
        try:
            descriptor, draft = tempfile.mkstemp(dir=self.path.parent, prefix=".config.ini.")
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
                file.write(self.text)
                file.flush()
                os.fsync(file.fileno())
            mode = stat.S_IMODE(os.stat(self.path).st_mode) if self.path.exists() else 0o644
            os.chmod(draft, mode)
            os.replace(draft, self.path)
        except OSError as error:
            if draft is not None:
                Path(draft).unlink(missing_ok=True)
            raise UserError(f"{self.path} cannot be written: {error.strerror}.") from error


def read_ini(path: Path, section: str = SECTION) -> ConfigIni:
    """The config.ini at `path`.

    Raises:
        UserError: it cannot be read, is no UTF-8 text, too large, or as ConfigIni.
    """
    try:
        if not path.exists():
            raise UserError(f"{path} is missing.", f"Put it back: a line [{section}] is enough.")
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is no config.ini: not a regular file, or too large.")
        with open(path, encoding="utf-8", newline="") as file:
            return ConfigIni(file.read(), path, section)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text.", "Save it as UTF-8.") from error
