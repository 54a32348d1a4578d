"""The law of the package's rooms, and how a source tree is held against it.

A room is what stands at the top of `bipdeploy/`: a package or a module. Every import goes down the
order below, whether it stands at the top of a module, in a function, under TYPE_CHECKING, or in a
string that is imported later, such as a table's `bipdeploy.stages.score:run`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

# From the bottom up; rooms that stand side by side do not see each other. "" is `__init__.py`.
ORDER: tuple[tuple[str, ...], ...] = (
    ("errors", "table"),
    ("recipe", "running"),
    ("model",),
    ("data",),
    ("ort", "pruning", "reporting", "tuning"),
    ("planning", "serving"),
    ("exporters", "measuring"),
    ("stages",),
    ("pipeline",),
    ("comparing", "sweeping"),
    ("api",),
    ("", "cli"),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}

_NAMED = re.compile(r"(bipdeploy(?:\.\w+)+)(?::\w+)?")


def modules(root: Path) -> dict[str, Path]:
    """Module name → file, of the package whose folder is `root`."""
    return {".".join(("bipdeploy", *path.relative_to(root).with_suffix("").parts))
            .removesuffix(".__init__"): path for path in sorted(root.rglob("*.py"))}


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def imported(path: Path, known: Mapping[str, Path], *, everywhere: bool = True) -> set[str]:
    """Modules that a file imports; `everywhere`: in functions and for type checking too."""
    names: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in known else str(node.module))
        elif everywhere:
            pending += ast.iter_child_nodes(node)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += ast.iter_child_nodes(node)
    return names


def named(path: Path, known: Mapping[str, Path]) -> set[str]:
    """Modules that stand in a file's strings, to be imported or run later. A string whose end is
    filled in stands for the package before it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            whole = _NAMED.fullmatch(node.value.removesuffix("."))
            name = whole[1] if whole else ""
            while name and name not in known:
                name = name.rpartition(".")[0]
            names |= {name} - {"", "bipdeploy"}
    return names


def own_imports(root: Path) -> dict[str, set[str]]:
    """Module → modules of the package that it imports."""
    known = modules(root)
    return {module: imported(path, known) & known.keys() for module, path in known.items()}


def upward(root: Path) -> Iterator[str]:
    """A line for every import that does not go down, and for every room without a place."""
    known = modules(root)
    for module, path in known.items():
        if room(module) not in LEVEL:
            yield f"{module} is in no room of ORDER (tests/architecture.py)"
            continue
        for name in sorted((imported(path, known) & known.keys()) | named(path, known)):
            if room(name) != room(module) and LEVEL.get(room(name), 99) >= LEVEL[room(module)]:
                yield f"{module} imports {name}, which is not below it"


def circles(root: Path) -> Iterator[str]:
    """A line for every chain of imports that comes back to where it began."""
    graph = own_imports(root)
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> Iterator[str]:
        if module in trail:
            yield " → ".join((*trail[trail.index(module):], module))
        elif module not in done:
            for name in sorted(graph[module]):
                yield from visit(name, (*trail, module))
            done.add(module)

    for module in graph:
        yield from visit(module, ())
