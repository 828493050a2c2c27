"""docs/: English and Chinese pages stay in step, links lead somewhere, generated pages are so."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend import reference_docs
from backend.command_docs import chinese
from tests.app_process import ROOT

DOCS = ROOT / "docs"
# Records of measurements: figures, for who works on the code.
ENGLISH_ONLY = {"performance.md", "performance-log.md", "desk-performance.md", "benchmarks.md"}
PAGES = sorted(path for path in DOCS.rglob("*.md") if not path.name.endswith(".zh.md"))
PAIRS = [path for path in PAGES if path.name not in ENGLISH_ONLY]


def twin(page: Path) -> Path:
    return page.with_suffix(".zh.md")


def name(page: Path) -> str:
    return str(page.relative_to(DOCS))


def headings(page: Path) -> list[int]:
    """Their levels, in order."""
    return [len(line) - len(line.lstrip("#")) for line in lines(page) if line.startswith("#")]


def lines(page: Path) -> list[str]:
    return page.read_text(encoding="utf-8").splitlines()


def blocks(page: Path) -> Iterator[list[str]]:
    """Indented code blocks."""
    block: list[str] = []
    for line, before in zip([*lines(page), ""], ["", *lines(page)]):
        if line.startswith("    ") and (block or not before):
            block.append(line)
        elif block and line:
            yield block
            block = []
    if block:
        yield block


@pytest.mark.parametrize("page", PAIRS, ids=name)
def test_a_page_and_its_chinese_twin_are_in_step(page: Path) -> None:
    other = twin(page)
    assert other.is_file(), f"{name(page)} has no Chinese twin"
    assert lines(page)[2] == f"[中文]({other.name})"
    assert lines(other)[2] == f"[English]({page.name})"
    assert headings(page) == headings(other)
    assert len(list(blocks(page))) == len(list(blocks(other)))
    # Commands are the same, but for what is said about them and for texts that one sends.
    commands = [re.split("  +", line.strip())[0] for line in lines(page)
                if line.startswith("    python app.py")]
    assert all(command in other.read_text(encoding="utf-8") for command in commands)


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")) + [ROOT / "README.md"],
                         ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for label, target in re.findall(r"\[([^]\n]*)\]\(([^)\s]+)\)", text):
        path = page.parent / target.partition("#")[0]
        if re.match(r"https?:|#", target):
            continue
        assert path.exists(), target
        if page.name.endswith(".zh.md") and label != "English" and path.suffix == ".md":
            assert path.name.endswith(".zh.md") or path.name in ENGLISH_ONLY, target


def test_reference_pages_are_made_of_the_code() -> None:
    assert not reference_docs.texts() - chinese().keys()
    for path, text in reference_docs.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: make docs"
