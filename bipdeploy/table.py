"""The one shape of what a recipe names: a criterion, a repair, an exporter, an engine, a stage…

Each kind has a table of rows with the same first columns. Looking at a table loads nothing of what
its rows stand for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar


@dataclass(frozen=True)
class Row:
    """name: as recipes write it. needs: what has to be there; of what kind, its table says.
    refuses: raises InputError for what cannot work, given the resolved recipe; loads no torch.
    function: what does it, as "module:function"."""

    name: str
    needs: tuple[str, ...]
    refuses: Callable[[Any], None] | None
    function: str

    def load(self) -> Callable[..., Any]:
        """The function, imported now."""
        return loaded(self.function)

    def refuse(self, resolved: Any) -> None:
        """Raise InputError where this cannot work on what a recipe was resolved to."""
        if self.refuses:
            self.refuses(resolved)


def loaded(function: str) -> Callable[..., Any]:
    """What "module:function" names, imported now."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


R = TypeVar("R", bound=Row)


def by_name(*rows: R) -> dict[str, R]:
    """A table of rows. Raises ValueError where two have one name."""
    table = {row.name: row for row in rows}
    if len(table) < len(rows):
        raise ValueError(f"two rows have one name: {[row.name for row in rows]}")
    return table
