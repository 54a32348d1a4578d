"""Parts of large texts, drawn before anything is tokenised: a million tokens take seconds."""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, Protocol, TypeVar

from bipdeploy.data.text import Text

# Texts of at most so many characters are always tokenised whole: Python's reference text, and the
# training text of wikitext-2 (11 million), the largest that published protocols calibrate on.
LARGE = 12 * 2**20
# Characters that are drawn for every token that is asked for: more than most tokenizers put in one.
PER_TOKEN = 8
LEAST = 2**20  # characters that are drawn at least, so that windows come from many places
_WINDOWS = 4  # a long document is cut into pieces of so many windows, at PER_TOKEN

_SPACE = re.compile(r"\s+")


class Drawable(Protocol):
    """What parts are drawn from: a text or rows."""

    def sizes(self) -> list[int]:
        """Characters of each document or row."""

    def take(self, places: Iterable[int]) -> Any:
        """Some of them, in the order of `places`."""


D = TypeVar("D", bound=Drawable)


def parts(source: D, tokens: int, seed: int, window: int | None = None) -> Iterator[D]:
    """Parts of a text that hold about `tokens` tokens or more, each larger than the one before;
    the last is the whole. A text that is not `LARGE`, or not much larger than the first part would
    be, is given whole at once.

    Documents (or rows) are drawn by `seed` and stay in the order of the text; with `window`, the
    tokens in one, those of running text that are longer than a few windows are first cut at blanks.
    The same in every process.
    """
    wanted, total = max(LEAST, PER_TOKEN * tokens), sum(source.sizes())
    if total > LARGE and 2 * wanted < total:
        pieces = source
        if window is not None and isinstance(source, Text) and not source.conversations:
            pieces = replace(source, documents=tuple(
                piece for document in source.documents
                for piece in _cut(document, _WINDOWS * PER_TOKEN * window)))
        sizes = pieces.sizes()
        order = _order(len(sizes), seed)
        reached = list(accumulate(sizes[place] for place in order))
        while 2 * wanted < total:
            yield pieces.take(sorted(order[:bisect_left(reached, wanted) + 1]))
            wanted *= 4
    yield source


def apportioned(count: int, shares: Sequence[float]) -> list[int]:
    """`count` by shares, to whole numbers by largest remainders, each at least 1."""
    assert count >= len(shares)
    wanted = [count * share / sum(shares) for share in shares]
    found = [max(1, int(exact)) for exact in wanted]
    while (left := count - sum(found)):
        behind = [exact - own for exact, own in zip(wanted, found, strict=True)]
        if left > 0:
            found[behind.index(max(behind))] += 1
        else:  # what was raised to 1 is taken from those that have most above their share
            most = min((own, place) for place, own in enumerate(behind) if found[place] > 1)[1]
            found[most] -= 1
    return found


def interleaved(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(source, number) of all windows of several sources, each spread evenly over the whole, so
    that a part of it, such as the end, has about the same shares."""
    places = [((number + 0.5) / count, source, number) for source, count in enumerate(counts)
              for number in range(count)]
    return [(source, number) for _, source, number in sorted(places)]


def described(source: Drawable, part: Drawable) -> dict[str, Any]:
    """Which way `part` was taken from `source`, for the record of where windows come from."""
    return {"way": "all of the text" if part is source else "parts of the text, drawn by seed",
            "characters": sum(part.sizes()), "of": sum(source.sizes())}


def _cut(document: str, size: int) -> Iterator[str]:
    """Pieces of about `size` characters; the blanks between two are left out. Text without blanks
    is cut after twice as many."""
    start = 0
    while len(document) - start > 2 * size:
        found = _SPACE.search(document, start + size, start + 2 * size)
        end, following = found.span() if found else (start + 2 * size, start + 2 * size)
        yield document[start:end]
        start = following
    yield document[start:]


def _order(count: int, seed: int) -> list[int]:
    """Places in an order of chance that depends on `seed`, and not as that of windows does."""
    import torch

    own = int.from_bytes(hashlib.sha256(f"{seed}:parts".encode()).digest()[:7], "big")
    return torch.randperm(count, generator=torch.Generator().manual_seed(own)).tolist()
