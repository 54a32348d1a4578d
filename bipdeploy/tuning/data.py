"""From documents to windows with labels, and the order in which training reads them. Pure.

Shapes: N windows, T tokens in a window.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

IGNORED = -100  # the label of a token that counts in no loss

ALPACA_COLUMNS = ("instruction", "input", "output")

# Stanford Alpaca's prompts (Taori et al. 2023), with and without an input.
_WITH_INPUT = """Below is an instruction that describes a task, paired with an input that provides \
further context. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:"""
_WITHOUT_INPUT = """Below is an instruction that describes a task. Write a response that \
appropriately completes the request.

### Instruction:
{instruction}

### Response:"""

Encode = Callable[[str, bool], list[int]]  # text, whether special tokens are added → token ids


class Document(NamedTuple):
    """Token ids, and for each the id itself or `IGNORED` where it counts in no loss."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Windows:
    """ids, labels: [N, T]. A token is predicted from those before it in its window, so the label
    of the first one is never used.

    cut: tokens of the text that are in no window. empty: windows that were left out because none
    of their tokens counts. documents, lost: how many there were, and how many of these have no
    token that counts in a window.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    cut: int = 0
    empty: int = 0
    documents: int = 0
    lost: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: torch.Tensor | Sequence[int]) -> Windows:
        """Some of the windows, in the order of `rows`."""
        chosen = torch.as_tensor(rows)
        return Windows(self.ids[chosen], self.labels[chosen])

    @property
    def predicted(self) -> int:
        """How many tokens count in a loss."""
        return int((self.labels[:, 1:] != IGNORED).sum())


def alpaca(row: Mapping[str, str], encode: Encode, end: int | None, *,
           response_only: bool) -> Document:
    """An instruction in Stanford's prompt, its response, and the token `end` (where there is one).

    Prompt and response are encoded apart, so that no token straddles the two.
    """
    template = _WITH_INPUT if row["input"].strip() else _WITHOUT_INPUT
    prompt = encode(template.format_map(row), True)
    response = encode(row["output"], False) + ([] if end is None else [end])
    shown = [IGNORED] * len(prompt) if response_only else prompt
    return Document(prompt + response, shown + response)


def answered(ids: Sequence[int], places: Sequence[tuple[int, int]],
             answers: Sequence[tuple[int, int]]) -> Document:
    """A conversation, in which the tokens count that are in an answer or reach into one.

    `places`: where each token stands in the written conversation, [start, end) in characters.
    """
    starts, ends = [start for start, _ in places], [end for _, end in places]
    shown = [IGNORED] * len(ids)
    for first, last in answers:
        inside = slice(bisect_right(ends, first), bisect_left(starts, last))
        shown[inside] = ids[inside]
    return Document(list(ids), shown)


def before_answer(document: Document) -> int:
    """Tokens before the first that counts; all where none does."""
    return next((place for place, label in enumerate(document.labels) if label != IGNORED),
                len(document.labels))


def plain(ids: Sequence[int]) -> Document:
    """Running text, every token of which counts."""
    return Document(list(ids), list(ids))


def pack(documents: Iterable[Document], tokens: int) -> Windows:
    """Documents one after another, cut into windows; the rest that fills none is left out."""
    ids: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    for document in documents:
        ids += document.ids
        labels += document.labels
        lengths.append(len(document.ids))
    whole = len(ids) // tokens * tokens
    owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
    return _useful(torch.tensor(ids[:whole], dtype=torch.long).view(-1, tokens),
                   torch.tensor(labels[:whole], dtype=torch.long).view(-1, tokens),
                   owners[:whole].view(-1, tokens), len(lengths), len(ids) - whole)


def pad(documents: Sequence[Document], tokens: int, filler: int) -> Windows:
    """One document in a window: its first tokens, then `filler`, which is to the right of all that
    attends to the left and counts in no loss, so it changes nothing."""
    ids = torch.full((len(documents), tokens), filler)
    labels = torch.full((len(documents), tokens), IGNORED)
    for row, document in enumerate(documents):
        length = min(tokens, len(document.ids))
        ids[row, :length] = torch.tensor(document.ids[:length], dtype=torch.long)
        labels[row, :length] = torch.tensor(document.labels[:length], dtype=torch.long)
    owners = torch.arange(len(documents))[:, None].expand(-1, tokens)
    return _useful(ids, labels, owners, len(documents),
                   sum(max(0, len(d.ids) - tokens) for d in documents))


def _useful(ids: torch.Tensor, labels: torch.Tensor, owners: torch.Tensor, documents: int,
            cut: int) -> Windows:
    """Without the windows in which no token counts. owners [N, T]: the document of each token."""
    counts = labels != IGNORED
    counts[:, :1] = False
    useful = counts.any(dim=1)
    return Windows(ids[useful], labels[useful], cut, int((~useful).sum()), documents,
                   documents - len(owners[counts].unique()))


def hold_back(windows: Windows, count: int, seed: int) -> tuple[Windows, Windows]:
    """Windows to train on, and `count` others drawn by `seed`; both in the order of the text."""
    order = _permutation(len(windows), seed, "validation")
    return windows.take(order[count:].sort().values), windows.take(order[:count].sort().values)


def rows_of_step(step: int, batch: int, count: int, seed: int) -> torch.Tensor:
    """Which of `count` windows optimiser step `step` reads: [batch].

    Epoch after epoch, each in an order that depends on the seed and its number alone.
    """
    places = torch.arange(step * batch, (step + 1) * batch)
    epochs = {int(epoch): _permutation(count, seed, "epoch", int(epoch))
              for epoch in (places // count).unique()}
    return torch.stack([epochs[place // count][place % count] for place in places.tolist()])


def derived_seed(seed: int, *purpose: object) -> int:
    """A seed of its own for one purpose: unlike seed + 1 it meets no other purpose's."""
    named = ":".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(named.encode()).digest()[:7], "big")


def _permutation(count: int, seed: int, *purpose: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(derived_seed(seed, *purpose))
    return torch.randperm(count, generator=generator)
