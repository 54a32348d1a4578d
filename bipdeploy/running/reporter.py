"""Whom a stage tells about its progress."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """What a stage tells about its progress."""

    def total(self, steps: int, what: str = "") -> None: ...
    def advance(self, steps: int = 1) -> None: ...
    def note(self, text: str) -> None: ...


class Silent:
    """A reporter for use from Python: keeps notes, shows nothing."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def total(self, steps: int, what: str = "") -> None: ...

    def advance(self, steps: int = 1) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)
