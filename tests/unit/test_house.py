"""The house rules: imports go down only, files stay short, nothing unsafe is called."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path
    for folder in ("backend", "kernels", "quantize", "ui", "assets")
    for path in (ROOT / folder).rglob("*.py")
) + [ROOT / "app.py"]
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# Module prefix -> floor; the longest matching prefix counts. The standard library's own
# backend.config and backend.errors are open to all.
FLOORS = {
    "app": 50,
    "ui": 40,
    "backend.server": 40,
    "backend.console": 40,
    "backend.doctor": 40,
    "backend.benchmark": 40,
    "backend.services": 35,
    "backend.compare": 34,
    "backend.spare_engines": 33,
    "backend.live_reply": 31,
    "backend.engine_manager": 32,
    "backend.classroom": 33,
    "backend.class_file": 34,
    "backend.chat": 30,
    "backend.model_library": 30,
    "backend.jobs": 30,
    "backend.quick_command": 31,
    "backend.remote": 30,
    "backend.conversation": 31,
    "backend.remote_session": 31,
    "quantize": 30,
    "quantize.guide": 45,  # times what is served, too
    "quantize.commands": 46,
    "backend.guide": 28,
    "backend.engine": 20,
    "backend.tokenizer": 20,
    "backend.chat_template": 20,
    "backend.detokenizer": 20,
    "backend.memory": 25,
    "backend.footprint": 26,
    "backend.remote_http": 28,
    "backend.hub": 29,
    "backend.hub_commands": 40,
    "backend.target": 39,
    "backend.turbomind": 45,
    "backend.messages": 44,
    "backend.chat_commands": 45,
    "backend.command_line": 6,
    "backend.command_docs": 7,
    "backend.reference_docs": 8,
    "backend.command_examples": 7,
    "backend.command_spelling": 5,
    "backend.model_files": 18,
    "backend.chat_formats": 19,
    "backend.template_process": 19,
    "backend.keyfile": 20,
    "backend.admission": 20,
    "backend.history": 32,
    "backend.history_file": 20,
    "backend.workspace": 25,
    "backend.import_bin": 26,
    "backend.workspace_commands": 40,
    "backend.proxy_command": 45,
    "backend.workspace.layout": 5,  # where a workspace's files are: every floor reads them
    "backend.models": 15,
    "backend.layers": 14,
    "kernels": 10,
    "backend.job_events": 4,
    "backend.benchmark_result": 3,
    "backend.data_dir": 3,
    "backend.config": 0,
    "backend.errors": 0,
}
# On one floor, different rooms do not enter one another, except along these.
DOORS = {
    ("backend.remote", "backend.chat"),  # implements its interface
    ("backend.config", "backend.errors"),
    ("backend.detokenizer", "backend.tokenizer"),
    ("backend.chat_template", "backend.tokenizer"),
}
ONLY_IN = {
    "gradio": ("ui", "app"),
    "fastapi": ("backend.server", "app", "ui.build"),
    "transformers": ("assets",),
    "triton": ("kernels.gpu",),
}


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(module: str) -> str | None:
    fits = [room for room in FLOORS if module == room or module.startswith(room + ".")]
    return max(fits, key=len, default=None)


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_go_down_only(path):
    own = module_of(path)
    room = room_of(own)
    if own.startswith("assets."):
        return
    assert room is not None or own == "backend", f"{own} has no floor: give it one in FLOORS"
    for imported in imports_of(path):
        for package, allowed in ONLY_IN.items():
            if imported == package or imported.startswith(package + "."):
                assert any(own == a or own.startswith(a + ".") for a in allowed), (
                    f"{own} imports {imported}"
                )
        target = room_of(imported)
        if room is None or target is None or target == room or (room, target) in DOORS:
            continue
        assert FLOORS[target] < FLOORS[room], f"{own} imports {imported}, which is not below it"


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=module_of)
def test_no_file_over_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_nothing_unpickles_or_runs_foreign_code(path):
    text = path.read_text(encoding="utf-8")
    if module_of(path) == "backend.import_bin":  # a process of its own, with limits
        assert text.count("torch.load(") == text.count("weights_only=True)") == 1
        text = text.replace("torch.load(", "")
    for word in (
        r"import pickle|\bpickle\.\w",
        r"torch\.load\(",
        r"(?<![\w.])eval\(",
        r"(?<![\w.])exec\(",
        r"trust_remote_code\s*=\s*True",
        r"shell\s*=\s*True",
    ):
        assert not re.search(word, text), f"{word} in {path.name}"


def test_config_and_errors_use_the_standard_library_only():
    for name in ("config", "errors"):
        for imported in imports_of(ROOT / "backend" / f"{name}.py"):
            top = imported.split(".")[0]
            assert top in __import__("sys").stdlib_module_names or imported.startswith(
                "backend.errors"
            ), imported


def test_no_module_is_called_utils():
    assert not [path for path in SOURCES + TESTS if "utils" in path.stem]


def test_the_readme_shows_every_file():
    """The tree in the README has a line for every source file below the five rooms."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [path for path in SOURCES if path.name not in readme and path.name != "__init__.py"]
    assert not missing


def test_torch_and_triton_are_a_published_pair():
    """requirements.txt pins the triton that the pinned torch asks for on Linux."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    torch_pin = re.search(r"^torch==(\S+)", text, re.M)
    triton_pin = re.search(r"^triton==([^;\s]+)", text, re.M)
    # torch's own metadata on the package index: Requires-Dist of its Linux wheels.
    published = {"2.11.0": "3.6.0", "2.13.0": "3.7.1"}
    assert torch_pin and triton_pin and published[torch_pin[1]] == triton_pin[1]
