"""A package's rooms (its first-level packages and modules): who imports whom, drawn and listed.

Every import counts, in functions and for type checking too. A room's level is the longest way from
it down to a room that imports nothing. The package's own `__init__` and `__main__` are doors, not
rooms, and are left out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

DOORS = ("__init__", "__main__")
BOX, PASS, GAP_X, HIGH, GAP_Y, EDGE = 104, 6, 16, 28, 34, 8  # pixels; PASS: of an arrow
STYLE = ("color: var(--md-typeset-color, currentColor); display: block; margin: 0 auto; "
         "max-width: 100%; height: auto; "
         "font: 13px system-ui, sans-serif")


class CycleError(Exception):
    """Rooms import each other in a circle, so there are no levels to draw."""


@dataclass(frozen=True)
class Room:
    """A first-level package or module: the first line of its docstring, and what it imports."""

    name: str
    about: str
    imports: frozenset[str]


def read(package: Path) -> dict[str, Room]:
    """The rooms of a package by name, from its files alone."""
    files = {path: path.relative_to(package).with_suffix("").parts
             for path in sorted(package.rglob("*.py"))}
    names = {parts[0] for parts in files.values()} - set(DOORS)
    found: dict[str, set[str]] = {name: set() for name in names}
    about: dict[str, str] = {}
    for path, parts in files.items():
        if parts[0] in names:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            package_parts = (package.name, *parts[:-1])
            found[parts[0]] |= {room for room in _imported(tree, package_parts) if room in names}
            if len(parts) == 1 or parts[1:] == ("__init__",):
                about[parts[0]] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return {name: Room(name, about.get(name, ""), frozenset(found[name] - {name}))
            for name in sorted(names)}


def _imported(tree: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """First-level names below the package that a module imports, wherever in it."""
    for node in ast.walk(tree):
        modules: list[list[str]] = []
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[:len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            modules = [[*base, alias.name] for alias in node.names]
        for parts in modules:
            if parts[0] == package[0] and len(parts) > 1:
                yield parts[1]


def levels(rooms: Mapping[str, Room]) -> dict[str, int]:
    """The level of every room, 0 for those that import none. Raises CycleError."""
    found: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> int:
        if name in trail:
            circle = " → ".join((*trail[trail.index(name):], name))
            raise CycleError(f"packages that import each other cannot be drawn: {circle}")
        if name not in found:
            below = [visit(other, (*trail, name)) for other in sorted(rooms[name].imports)]
            found[name] = 1 + max(below, default=-1)
        return found[name]

    for name in rooms:
        visit(name, ())
    return found


def arrows(rooms: Mapping[str, Room]) -> list[tuple[str, str]]:
    """The imports that follow from no others (the transitive reduction)."""
    levels(rooms)  # there is no reduction of a circle
    reach: dict[str, set[str]] = {}

    def reached(name: str) -> set[str]:
        if name not in reach:
            own = rooms[name].imports
            reach[name] = set(own).union(*(reached(other) for other in own))
        return reach[name]

    return [(name, other) for name, room in rooms.items() for other in sorted(room.imports)
            if not any(other in reached(between) for between in room.imports - {other})]


def picture(rooms: Mapping[str, Room]) -> str:
    """The rooms as SVG: one row per level, the highest on top, arrows to what a room needs."""
    level, edges = levels(rooms), arrows(rooms)
    top = max(level.values(), default=0)
    lines = [_line(a, b, level) for a, b in edges]
    rows = [sorted(n for n in rooms if level[n] == top - number) for number in range(top + 1)]
    for line in lines:
        for point in line[1:-1]:
            rows[top - level[line[0]] + line.index(point)].append(point)
    place, width = _places(rows, lines)
    height = len(rows) * (HIGH + GAP_Y) - GAP_Y + 2 * EDGE
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" role="img" aria-label="Packages and what they import" '
        f'style="{STYLE}">',
        '<defs><marker id="tip" viewBox="0 0 6 6" refX="6" refY="3" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 L6 3 L0 6 z" fill="currentColor"/></marker>'
        '</defs>',
        '<g fill="none" stroke="currentColor" stroke-opacity="0.55">',
        *(_arrow([place[point] for point in line]) for line in lines), "</g>",
        *(_box(name, *place[name]) for name in rooms), "</svg>"])


def _line(start: str, end: str, level: Mapping[str, int]) -> list[str]:
    """The points that an arrow goes through: one in every row between, where no box is."""
    between = range(1, level[start] - level[end])
    return [start, *(f"{start} {end} {number}" for number in between), end]


def _wide(point: str) -> int:
    return PASS if " " in point else BOX


def _places(rows: list[list[str]], lines: list[list[str]]
            ) -> tuple[dict[str, tuple[float, float]], float]:
    """Middle of every box's upper side, and the width: rows are centred, and each is ordered by
    what points into it."""
    widths = [sum(map(_wide, row)) + GAP_X * (len(row) - 1) for row in rows]
    width = max(widths, default=0) + 2 * EDGE
    place: dict[str, tuple[float, float]] = {}
    for number, row in enumerate(rows):
        above: dict[str, list[float]] = {point: [] for point in row}
        for line in lines:
            for before, point in pairwise(line):
                if point in above:
                    above[point].append(place[before][0])
        row = sorted(row, key=lambda point: (
            sum(above[point]) / len(above[point]) if above[point] else width / 2, point))
        left = (width - widths[number]) / 2
        for point in row:
            place[point] = (left + _wide(point) / 2, EDGE + number * (HIGH + GAP_Y))
            left += _wide(point) + GAP_X
    return place, width


def _arrow(points: list[tuple[float, float]]) -> str:
    """From the lower side of the first to the upper side of the last, straight past the others."""
    x, y = points[0]
    path = f"M{x:g} {y + HIGH:g}"
    for (x, y), (to_x, to_y) in pairwise(points):
        bend = y + HIGH + GAP_Y / 2
        path += f" C{x:g} {bend:g} {to_x:g} {bend:g} {to_x:g} {to_y:g}"
        if (to_x, to_y) != points[-1]:
            path += f" V{to_y + HIGH:g}"
    return f'<path d="{path}" marker-end="url(#tip)"/>'


def _box(name: str, x: float, y: float) -> str:
    return (f'<rect x="{x - BOX / 2:g}" y="{y:g}" width="{BOX}" height="{HIGH}" rx="4" '
            'fill="var(--md-default-bg-color, Canvas)" stroke="currentColor"/>'
            f'<text x="{x:g}" y="{y + HIGH / 2 + 4:g}" text-anchor="middle" '
            f'fill="currentColor">{name}</text>')


def table(rooms: Mapping[str, Room]) -> str:
    """The rooms as a Markdown table, from the top level down."""
    level = levels(rooms)
    rows = ["| room | what it is | imports |", "|---|---|---|"]
    for name in sorted(rooms, key=lambda name: (-level[name], name)):
        imports = ", ".join(sorted(rooms[name].imports, key=lambda n: (-level[n], n)))
        rows.append(f"| `{name}` | {rooms[name].about} | {imports} |")
    return "\n".join(rows)
