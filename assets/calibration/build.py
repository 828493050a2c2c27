"""Writes en.txt (calibration and training) and heldout_en.txt (evaluation only).

Both are made from what every Python installation brings along under the PSF licence: the Language
Reference in ``pydoc_data.topics`` and the docstrings of the standard library. A document is one
topic or one module; whole documents are held out, and no paragraph stands in both files.

    python assets/calibration/build.py
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

HERE = Path(__file__).parent
HELDOUT_BYTES = 100_000
SHORTEST_DOCUMENT = 400  # characters; shorter ones say nothing about a model
SHORTEST_HELDOUT_PARAGRAPH = 40  # "Example:" stands everywhere and would tie the two files

# Tests, generated tables and jokes are no prose.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def standard_library() -> Iterator[tuple[str, str]]:
    """Yields (module name, its docstrings joined by blank lines), sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.intersection(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # lib2to3 ships files that are broken on purpose
        docstrings = (ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, DOCUMENTED))
        yield ".".join(parts)[:-3], "\n\n".join(d for d in docstrings if d)


def is_prose(paragraph: str) -> bool:
    """False for tables, rulers, and lists of symbols."""
    if re.search(r"[+|][-=]{3,}|[-=*~^]{8,}|\x1b", paragraph) or not paragraph.isascii():
        return False
    plain = sum(c.isalnum() or c.isspace() or c in ".,'" for c in paragraph)
    return plain >= 0.8 * len(paragraph)


def paragraphs(text: str) -> list[str]:
    """The prose paragraphs of a document, without the markup of the Python documentation."""
    text = text.replace("\t", "    ").replace("\r", "")
    text = re.sub(r"\*\*?([\w .,()-]+?)\*\*?", r"\1", text)  # *emphasis*
    text = re.sub(r":\w+:`~?([^`<]+?)(?:\s*<[^>]*>)?`", r"\1", text)  # :class:`name`
    text = text.replace('"', "").replace("``", "")
    blocks = (block.strip("\n").rstrip() for block in re.split(r"\n\s*\n", text))
    return [block for block in blocks if len(block) >= 12 and is_prose(block)]


def key(paragraph: str) -> str:
    """What makes two paragraphs the same: their words."""
    return re.sub(r"\W+", " ", paragraph).strip().lower()


def documents() -> list[tuple[str, list[str]]]:
    """(name, paragraphs) of every document, ordered by a hash of the name, free of repetition."""
    named = [(f"topic {name}", text) for name, text in topics.items()] + list(standard_library())
    named.sort(key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
    seen: set[str] = set()
    found = []
    for name, text in named:
        fresh = []
        for paragraph in paragraphs(text):
            if key(paragraph) not in seen:
                seen.add(key(paragraph))
                fresh.append(paragraph)
        if sum(map(len, fresh)) >= SHORTEST_DOCUMENT:
            found.append((name, fresh))
    return found


def main() -> None:
    heldout: list[str] = []
    training: list[str] = []
    for _, fresh in documents():
        if sum(map(len, heldout)) < HELDOUT_BYTES:
            kept = [p for p in fresh if len(p) >= SHORTEST_HELDOUT_PARAGRAPH]
            if kept:
                heldout.append("\n\n".join(kept))
        else:
            training.append("\n\n".join(fresh))
    # Documents are parted by two blank lines: paragraphs stay recognisable, and so do documents.
    for name, texts in (("heldout_en.txt", heldout), ("en.txt", training)):
        (HERE / name).write_text("\n\n\n".join(texts) + "\n", encoding="utf-8")
        print(f"{name}: {len(texts)} documents, {(HERE / name).stat().st_size} bytes")


if __name__ == "__main__":
    main()
