"""What a column holds: texts, conversations, or what is neither and is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bipdeploy.data import chat
from bipdeploy.data.chat import Conversation
from bipdeploy.errors import InputError

_INSTEAD = ("give a column of text, or of conversations: lists of {role, content} or "
            "{from, value} messages")


def read(values: Iterable[Any], place: str, *,
         blanks: bool = False) -> tuple[list[str], list[Conversation]]:
    """A column's texts or its conversations; one of the two lists is empty.

    Rows without a value, blank texts (but with `blanks`) and conversations in which nothing is
    said are passed over. `place` names the column in messages. Raises InputError with one line for
    any other value, and where a column holds both kinds.
    """
    texts: list[str] = []
    conversations: list[Conversation] = []
    for row, value in enumerate(values, 1):
        if value is None:
            continue
        if isinstance(value, str):
            _require_characters(value, place, row)
            if blanks or value.strip():
                texts.append(value)
        elif isinstance(value, list) and all(isinstance(part, dict) for part in value[:1]):
            messages = _conversation(value, place, row)
            if any(message.content.strip() for message in messages):
                conversations.append(messages)
        else:
            raise InputError(f"{place} holds {_kind(value)} (row {row}), which is no text; "
                             f"{_INSTEAD}")
        if texts and conversations:
            raise InputError(f"{place} holds conversations in some rows and plain text in others "
                             f"(row {row}); give a column of one kind")
    return texts, conversations


def texts(values: Iterable[Any], place: str) -> list[str]:
    """A column's texts, row by row; an absent one is empty. Raises InputError for other values."""
    found = []
    for row, value in enumerate(values, 1):
        if value is not None and not isinstance(value, str):
            raise InputError(f"{place} holds {_kind(value)} (row {row}), which is no text; give a "
                             "column of text")
        _require_characters(value or "", place, row)
        found.append(value or "")
    return found


def _conversation(value: list[Any], place: str, row: int) -> Conversation:
    try:
        messages = chat.conversation(value)
    except ValueError as error:
        raise InputError(f"{place} holds what is no conversation (row {row}): {error}") from error
    for message in messages:
        _require_characters(message.content, place, row)
    return messages


def _require_characters(value: str, place: str, row: int) -> None:
    """JSON can spell half of a surrogate pair, which no encoding has."""
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place} holds half of a character (row {row}: "
                         f"{value[error.start:error.start + 1]!r}); mend the row or leave it "
                         "out") from error


def _kind(value: Any) -> str:
    """A value's type, for messages: `int`, `list of int`."""
    inner = f" of {type(value[0]).__name__}" if isinstance(value, list) and value else ""
    return f"values of the type {type(value).__name__}{inner}"
