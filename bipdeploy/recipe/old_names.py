"""Names that sections of a recipe had before. A recipe that has them reads as if it had the new."""

from __future__ import annotations

from typing import Any

SECTIONS = {"lora": "tune"}  # old → new

Location = tuple[str | int, ...]


def current(name: str) -> str:
    """A dotted name, such as a figure's or a field's, with its section's name of today."""
    section, dot, rest = name.partition(".")
    return SECTIONS.get(section, section) + dot + rest


def rename(data: dict[str, Any], lines: dict[Location, int], faults: list[str]) -> None:
    """Rename, in place, the sections of a recipe, its gates and the fields that it sweeps.

    `lines` says where keys stand and is renamed too. Both names of one thing are a fault.
    """
    sweep = data.get("sweep")
    fields = sweep.get("fields") if isinstance(sweep, dict) else None
    for at, section in (((), data), (("gates",), data.get("gates")), (("sweep", "fields"), fields)):
        if isinstance(section, dict):
            _rename(section, at, lines, faults)


def _rename(section: dict[Any, Any], at: Location, lines: dict[Location, int],
            faults: list[str]) -> None:
    found: dict[Any, Any] = {}
    for name, value in section.items():
        new = current(name) if isinstance(name, str) else name
        if new != name and new in section:
            line = f"line {lines[(*at, name)]}: " if (*at, name) in lines else ""
            faults.append(f"{line}{'.'.join(map(str, (*at, name)))}: the old name of {new}, which "
                          f"is given too; keep {new}")
            continue
        found[new] = value
        for place in [p for p in lines if new != name and p[:len(at) + 1] == (*at, name)]:
            lines[(*at, new, *place[len(at) + 1:])] = lines.pop(place)
    section.clear()
    section.update(found)
