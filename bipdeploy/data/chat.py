"""Conversations: what a column of messages holds, and how a model's chat template writes them."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from bipdeploy.errors import InputError

# The columns that conversations usually stand in.
COLUMNS = ("messages", "conversations")
ROLES = ("system", "user", "assistant")
_SHAREGPT = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}
# What a message may carry beside its content, and what would be lost if it were passed over.
_CARRIED = ("tool_calls", "function_call", "reasoning_content", "thinking", "images", "audio")
# Stands for an answer, to see where a template puts it: a character for private use.
_MARK = "\ue000"
# Some templates write today's date; the same text on every day needs one that stands still.
_TODAY = datetime.datetime(2024, 7, 26)


class Message(NamedTuple):
    role: str
    content: str


Conversation = tuple[Message, ...]


def conversation(value: Sequence[Any]) -> Conversation:
    """A list of {role, content} messages, or of ShareGPT's {from, value}, as it stands in a file.

    Of a content in parts the text parts are taken, one after another. Raises ValueError with what
    is no such thing.
    """
    return tuple(_message(message, f"message {place}") for place, message in enumerate(value, 1))


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"{place} is {_kind(message)}, not an object of role and content")
    given = {key: value for key, value in message.items() if value is not None}
    if "role" in given:
        role, content, known = given["role"], given.get("content"), {role: role for role in ROLES}
    elif "from" in given:
        role, content, known = given["from"], given.get("value"), _SHAREGPT
    else:
        raise ValueError(f"{place} has neither role and content nor from and value (it has "
                         f"{', '.join(map(str, given)) or 'nothing'})")
    carried = [key for key in _CARRIED if given.get(key)]
    if carried:
        raise ValueError(f"{place} has {carried[0]}, and only its content would be read; leave "
                         "such rows out")
    if not isinstance(role, str) or role not in known:
        raise ValueError(f"{place} has the role {role!r}, which is none of {', '.join(known)}; "
                         "leave such rows out or rename it")
    if isinstance(content, list):
        content = "".join(_part(part, place) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{place} has {_kind(content)} for its content, not text")
    return Message(known[role], content)


def _part(part: Any, place: str) -> str:
    if not isinstance(part, Mapping):
        raise ValueError(f"{place} has {_kind(part)} among its content's parts, not an object")
    if part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"{place} has a part of the type {part.get('type')!r}; only text is read, "
                         "leave such rows out")
    return part["text"]


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a value of the type {type(value).__name__}"


def said(messages: Conversation) -> str:
    """What was said, without roles, for comparing with other texts."""
    return "\n\n".join(message.content for message in messages)


def written(messages: Conversation, tokenizer: Any, *, opened: bool = False) -> str:
    """A conversation as the tokenizer's chat template writes it, its special tokens included;
    `opened`: with the beginning of the answer that would come next.

    The date is the same on every day. Raises InputError where there is no template, or it refuses.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise InputError("holds conversations, and the model's tokenizer has no chat template to "
                         "write them by; give running text, or put the model's "
                         "chat_template.jinja into its folder")
    try:
        return tokenizer.apply_chat_template(
            [message._asdict() for message in messages], tokenize=False,
            add_generation_prompt=opened, strftime_now=_TODAY.strftime)
    except (TemplateError, ValueError, TypeError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"holds what the model's chat template refuses ({line}): "
                         f"{_named(messages)}; leave such rows out") from error


def _named(messages: Conversation) -> str:
    begins = messages[0].content[:40] if messages else ""
    return f"the conversation that begins with {begins!r}"


def answers(messages: Conversation, tokenizer: Any) -> list[tuple[int, int]]:
    """Where the assistant speaks in the written conversation: [start, end) in characters.

    An answer starts where the conversation before it, opened for an answer, ends, and ends with
    the template's mark for the end of a turn. Templates that write an earlier answer otherwise
    than the last (some leave out its thoughts) are followed by writing a mark in the answer's
    place. Raises InputError where what stands around an answer depends on it.
    """
    whole = written(messages, tokenizer)
    spans: list[tuple[int, int]] = []
    for turn, message in enumerate(messages):
        if message.role != "assistant":
            continue
        marked = written((*messages[:turn], Message("assistant", _MARK), *messages[turn + 1:]),
                         tokenizer)
        head, _, tail = marked.partition(_MARK)
        start = len(head) if whole.startswith(head) else None
        if turn:
            opened = written(messages[:turn], tokenizer, opened=True)
            if whole.startswith(opened) and len(opened) <= len(head):
                start = len(opened)
        closed = written((*messages[:turn], Message("assistant", _MARK)), tokenizer)
        alike = takewhile(lambda pair: pair[0] == pair[1],
                          zip(tail, closed.partition(_MARK)[2], strict=False))
        end = len(whole) - len(tail) + sum(1 for _ in alike)
        if (start is None or _MARK not in marked or not whole.endswith(tail)
                or not (spans[-1][1] if spans else 0) <= start <= end):
            raise InputError("tune.loss_on: response, and the model's chat template does not tell "
                             f"where the answers of {_named(messages)} are; set tune.loss_on: all, "
                             "or leave such rows out")
        spans.append((start, end))
    return spans
