"""More English for training: docstrings of freely licensed Python packages that are installed.

Which packages there are, and of which version, is the training machine's matter; the training log
records how much text each gave. The standard library is not among them: its documentation is the
calibration text and the held-out text.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from assets.calibration.build import DOCUMENTED, key, paragraphs

# Package -> licence.
PACKAGES = {
    "torch": "BSD-3-Clause", "numpy": "BSD-3-Clause", "scipy": "BSD-3-Clause",
    "pandas": "BSD-3-Clause", "sklearn": "BSD-3-Clause", "statsmodels": "BSD-3-Clause",
    "sympy": "BSD-3-Clause", "networkx": "BSD-3-Clause", "skimage": "BSD-3-Clause",
    "jax": "Apache-2.0", "optax": "Apache-2.0", "flax": "Apache-2.0", "transformers": "Apache-2.0",
    "pyarrow": "Apache-2.0", "lightning": "Apache-2.0", "peft": "Apache-2.0",
    "gradio": "Apache-2.0", "requests": "Apache-2.0", "rich": "MIT",
}  # fmt: skip
SHORTEST_DOCUMENT = 400  # characters


def package_files(package: str) -> list[Path]:
    """The package's modules, tests apart; none if it is not installed."""
    spec = importlib.util.find_spec(package)
    folders = [Path(place) for place in spec.submodule_search_locations or ()] if spec else []
    return sorted(
        path for folder in folders for path in folder.rglob("*.py") if "test" not in str(path)
    )


def document(path: Path) -> list[str]:
    """Prose paragraphs of a module's docstrings, in order; none if it cannot be read."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
        return []
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, DOCUMENTED))
    return [p for text in texts if text for p in paragraphs(text)]


def library_texts(banned: set[str], workers: int) -> Iterator[tuple[str, str]]:
    """(package, document) pairs in a fixed order, no paragraph twice.

    Args:
        banned: keys of paragraphs (see `build.key`) that must not be among them.
    """
    seen = set(banned)
    with ProcessPoolExecutor(workers) as pool:
        for package in PACKAGES:
            for found in pool.map(document, package_files(package), chunksize=16):
                fresh = [p for p in dict.fromkeys(found) if key(p) not in seen]
                seen.update(map(key, fresh))
                text = "\n\n".join(fresh)
                if len(text) >= SHORTEST_DOCUMENT:
                    yield package, text
