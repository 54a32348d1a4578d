"""`builtin:pydocs`: the reference text that every Python installation carries.

Two sources, both read and never executed: the language reference topics in
`pydoc_data.topics`, and the docstrings of the standard library's modules. The text differs a
little between Python versions, so a run's manifest carries its content hash.

Python's documentation is under the PSF licence (zero-clause BSD for its code examples).
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

SPLITS = ("calibration", "validation", "test")

# Of ten hash buckets: five calibrate, two validate (ridge, early stopping), three test.
_BUCKETS = ("calibration",) * 5 + ("validation",) * 2 + ("test",) * 3

# Trees under the standard library's folder that are tests, vendored code or tools, not reference.
_SKIPPED = {"test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "ensurepip",
            "turtledemo", "__pycache__", "_pyrepl", "pydoc_data", "config"}

# Paragraphs shorter than this ("Parameters", "See also") recur everywhere and say nothing about
# overlap; longer ones are kept once, in the first document that holds them.
_DISTINCT_CHARS = 60

# Words in a row that two splits may not share: the length that contamination studies use.
_GRAM_WORDS = 13


def split_of(name: str) -> str:
    """The split that the document called `name` belongs to, by a hash of the name."""
    return _BUCKETS[int(hashlib.sha256(name.encode()).hexdigest(), 16) % len(_BUCKETS)]


def docstrings(source: str, module: str) -> str:
    """The signatures and docstrings of one module's source, as running text.

    Doctest paragraphs and paragraphs that are mostly not letters (tables, array print-outs) are
    left out: what remains is prose. Raises SyntaxError or ValueError where `source` does not parse.
    """
    tree = ast.parse(source)
    entries = []
    for title, node in _documented(tree, module):
        text = ast.get_docstring(node, clean=True)
        body = "\n\n".join(prose(text)) if text else ""
        if len(body) > 40:
            entries.append(f"{title}\n{body}")
    return "\n\n".join(entries)


def prose(text: str) -> list[str]:
    """The paragraphs of `text` that are prose: no doctests, no tables of numbers."""
    kept = []
    for paragraph in text.expandtabs().split("\n\n"):
        paragraph = paragraph.strip("\n").rstrip()
        dense = paragraph.replace(" ", "").replace("\n", "")
        if not dense or dense.startswith((">>>", "...", "+--", "===")):
            continue
        if sum(c.isalpha() and c.isascii() for c in dense) >= 0.7 * len(dense):
            kept.append(paragraph)
    return kept


def _documented(tree: ast.Module, module: str) -> Iterator[tuple[str, Documented]]:
    yield f"module {module}", tree
    pending: list[tuple[str, ast.Module | ast.ClassDef]] = [("", tree)]
    while pending:
        prefix, parent = pending.pop(0)
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.ClassDef):
                yield f"class {prefix}{node.name}", node
                pending.append((f"{prefix}{node.name}.", node))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{prefix}{node.name}({ast.unparse(node.args)})", node


def standard_library() -> Iterator[tuple[str, str]]:
    """Yield (module name, text) for every standard-library module that has docstrings."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or _SKIPPED & set(parts):
            continue
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            text = docstrings(path.read_text(encoding="utf-8"), module)
        except (SyntaxError, ValueError, UnicodeDecodeError):
            continue  # not this interpreter's own source (a template, or another encoding)
        if text:
            yield module, text


def topics() -> Iterator[tuple[str, str]]:
    """Yield (topic name, text) for the language reference topics that `help()` shows."""
    from pydoc_data.topics import topics as reference

    for name, text in sorted(reference.items()):
        yield f"topic:{name}", "\n\n".join(prose(inspect.cleandoc(text)))


@lru_cache(maxsize=1)
def _by_split() -> dict[str, list[str]]:
    """All documents by split. A paragraph that shares `_GRAM_WORDS` words in a row with another
    split's text (a near copy of it) is dropped, so that the splits do not leak into each other."""
    owner: dict[int, str] = {}
    by_split: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name, text in distinct([*topics(), *standard_library()]):
        split, kept = split_of(name), []
        for paragraph in text.split("\n\n"):
            words = paragraph.lower().split()
            grams = [hash(tuple(words[i:i + _GRAM_WORDS]))
                     for i in range(len(words) - _GRAM_WORDS + 1)]
            if all(owner.get(gram, split) == split for gram in grams):
                owner.update(dict.fromkeys(grams, split))
                kept.append(paragraph)
        if kept:
            by_split[split].append("\n\n".join(kept))
    return by_split


def distinct(documents: Iterable[tuple[str, str]],
             seen: set[str] | None = None) -> Iterator[tuple[str, str]]:
    """Drop every long paragraph that an earlier document (or `seen`) already holds."""
    seen = set() if seen is None else seen
    for name, text in documents:
        kept = []
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) >= _DISTINCT_CHARS:
                if key in seen:
                    continue
                seen.add(key)
            kept.append(paragraph)
        if kept:
            yield name, "\n\n".join(kept)


def documents(split: str) -> list[str]:
    """The documents of one split, in a fixed order.

    Modules are split whole, and no two splits share thirteen words in a row within a paragraph.
    Raises ValueError for a split that is not in `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"builtin:pydocs has no split {split!r}; use one of {', '.join(SPLITS)}")
    return list(_by_split()[split])
