"""`builtin:pydocs_choice`: which of four docstrings belongs to this signature?

Made from the `test` split of `builtin:pydocs` alone, without the answers that another split holds
too. The three wrong answers are the docstrings of other modules that are nearest in length, so
length says nothing. No random numbers: the questions are the same in every process; between Python
versions they differ, as the reference text does.

`pydocs_choice.yaml` beside this file makes it a task of lm-eval's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from bipdeploy.data import pydocs

SPLIT = "test"
QUESTIONS = 500
CHOICES = 4

_SIGNATURE = re.compile(r"class [\w.]+|[\w.]+\(.*\)")
_SIGNATURE_CHARS = 120
# Shorter ones ("Initialize.") fit too many signatures; longer ones have no others of their length.
_SENTENCE_CHARS = range(30, 161)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"*])")
# Docstrings that begin alike ("Return the name of …") would make a question with two answers.
_DISTINCT_CHARS = 20


class _Entry(NamedTuple):
    """The first sentence of a docstring; `document` numbers the module it comes from."""

    document: int
    signature: str
    sentence: str


def questions() -> list[dict[str, Any]]:
    """`QUESTIONS` rows of `signature`, `choices` and `answer`, the index of the right one."""
    entries = _entries()
    return [_question(number, entries) for number in range(min(QUESTIONS, len(entries)))]


def splits(**_: Any) -> dict[str, Any]:
    """The questions as lm-eval takes them: the one split `test`, as a data set."""
    from datasets import Dataset

    return {SPLIT: Dataset.from_list(questions())}


def _entries() -> list[_Entry]:
    """Every signature with its docstring's first sentence, each once, in an order by hash."""
    # Too short for `pydocs` to tell copies by: threading and asyncio say some things alike.
    seen = {entry.sentence.lower() for split in pydocs.SPLITS if split != SPLIT
            for entry in _described(split)}
    found: list[_Entry] = []
    for entry in _described(SPLIT):
        if not {entry.signature, entry.sentence.lower()} & seen:
            seen |= {entry.signature, entry.sentence.lower()}
            found.append(entry)
    return sorted(found, key=lambda e: _hash(e.signature + e.sentence))


def _described(split: str) -> Iterator[_Entry]:
    for number, document in enumerate(pydocs.documents(split)):
        for paragraph in document.split("\n\n"):
            signature, _, body = paragraph.partition("\n")
            if _SIGNATURE.fullmatch(signature) and len(signature) <= _SIGNATURE_CHARS:
                sentence = _SENTENCE_END.split(" ".join(body.split()))[0]
                if len(sentence) in _SENTENCE_CHARS:
                    yield _Entry(number, signature, sentence)


def _question(number: int, entries: list[_Entry]) -> dict[str, Any]:
    asked = entries[number]
    # Of equally long ones those that follow in the order of hashes, so that no entry is favoured.
    following = entries[number + 1:] + entries[:number]
    others = [e.sentence for e in following if e.document != asked.document
              and _beginning(e) != _beginning(asked)]
    choices = sorted(others, key=lambda o: abs(len(o) - len(asked.sentence)))[:CHOICES - 1]
    answer = int(_hash(asked.signature), 16) % CHOICES
    choices.insert(answer, asked.sentence)
    return {"signature": asked.signature, "choices": choices, "answer": answer}


def _beginning(entry: _Entry) -> str:
    return entry.sentence[:_DISTINCT_CHARS].lower()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
