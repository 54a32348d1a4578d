"""Learned widths: what stays for a budget, from a value of every group. Pure functions on tensors.

Groups are valued by what is learned of them; a part's width is worth what its best groups add up
to, and the knapsack of `search.py` picks the widths that lose least within the budget. That is the
projection which learned masks need at every step (GRASPrune, arXiv 2604.19398; DDP,
arXiv 2603.08065).

Shapes: G KV heads of a block, q query heads of each (1 where they leave together), F channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from bipdeploy.model.cost import Cost
from bipdeploy.model.families import Architecture, BlockWidths, Heads, Width
from bipdeploy.pruning.kept import BlockScores, Kept
from bipdeploy.pruning.search import Curve, solve_within


class Part(NamedTuple):
    """A part of a block, "heads" or "ffn", whose groups may leave."""

    block: int
    part: str

    @property
    def name(self) -> str:
        return f"{self.block}.{self.part}"


Values = Mapping[Part, torch.Tensor]  # of a value for each group: [G, q] of "heads", [F] of "ffn"


@dataclass
class _Known(Curve):
    """What is lost at every width that a part may have, in the order of its values."""

    lost: dict[Width, float] = field(default_factory=dict)

    def at(self, width: Width) -> float:
        return self.lost[width]


@dataclass(frozen=True)
class Budget:
    """What the model may have, and may cost: `choices(block, part)` are a part's widths, the least
    first; the widths' `cost` is at most `limit`."""

    arch: Architecture
    choices: Callable[[int, str], Sequence[Width]]
    cost: Cost
    limit: float

    def parts(self) -> Iterator[Part]:
        """The parts that have a choice."""
        for block in range(len(self.arch.blocks)):
            for part in ("heads", "ffn"):
                if len(self.choices(block, part)) > 1:
                    yield Part(block, part)

    def dense_cost(self, part: Part) -> float:
        """What a part costs as it is."""
        return self.cost.part(*part, self.arch.blocks[part.block].of(part.part))


def places(scores: Sequence[BlockScores], parts: Sequence[Part], *, comparable: bool,
           single: bool) -> dict[Part, torch.Tensor]:
    """Where each group stands among all of its kind, from 0 (the first to leave) to 1: [G, q], or
    [F] of channels. `single`: query heads stand by themselves.

    Only the order counts, as scores of different criteria have scales of their own, and heads are
    on another than channels. Scores that are not `comparable` between blocks are standardised
    within each first. Ties go to the lower index, which is kept.
    """
    found: dict[Part, torch.Tensor] = {}
    for kind in ("heads", "ffn"):
        own = [part for part in parts if part.part == kind]
        each = [torch.tensor(_of(scores[part.block], kind, single), dtype=torch.float64)
                for part in own]
        if not own:
            continue
        if not comparable:
            each = [(e - e.mean()) / e.std(correction=0).clamp(min=1e-30) for e in each]
        order = torch.cat(each).flip(0).argsort(stable=True)
        standing = torch.empty(len(order), dtype=torch.float64)
        standing[order] = (torch.arange(len(order), dtype=torch.float64) + 0.5) / len(order)
        for part, place in zip(own, standing.flip(0).split([len(e) for e in each]), strict=True):
            groups = len(scores[part.block].heads)
            found[part] = place.view(groups, -1) if kind == "heads" else place
    return found


def _of(scores: BlockScores, kind: str, single: bool) -> Sequence[float]:
    if kind == "ffn":
        return scores.ffn
    return scores.queries if single else scores.heads


def project(values: Values, budget: Budget) -> tuple[list[BlockWidths], dict[Part, torch.Tensor]]:
    """The widths that keep the most value within the budget, and which groups stay: a mask of the
    shape of each part's values.

    No part could be wider by its next width without the budget being exceeded. Every KV head
    keeps as many query heads; those of the highest value stay. Raises ValueError where the least
    widths exceed the budget.
    """
    arch, curves = budget.arch, []
    for part, own in values.items():
        widths = list(budget.choices(*part))
        lost = _lost(own.double(), widths, arch.blocks[part.block].group)
        curves.append(_Known(*part, widths, lost=dict(zip(widths, lost, strict=True))))
    found = solve_within(arch, curves, budget.choices, budget.limit, budget.cost)
    found = _filled(found, curves, budget)
    return found, {part: mask(own, found[part.block].of(part.part))
                   for part, own in values.items()}


def _lost(values: torch.Tensor, widths: Sequence[Width], group: int) -> list[float]:
    """The value that leaves with what a part gives up at each width."""
    total = float(values.sum())
    if values.ndim == 1:
        kept = values.sort(descending=True).values.cumsum(0)
        return [total - float(kept[width - 1]) for width in widths if isinstance(width, int)]
    best = _ordered(values)  # [G, q], whole heads first
    stays = best.cumsum(1).cumsum(0)
    return [total - float(stays[own.kv - 1, min(own.queries, best.shape[1]) - 1])
            for own in widths if isinstance(own, Heads)]


def _ordered(values: torch.Tensor) -> torch.Tensor:
    heads = values.sum(1).argsort(descending=True, stable=True)
    return values[heads].sort(dim=1, descending=True).values


def mask(values: torch.Tensor, width: Width) -> torch.Tensor:
    """Which groups of a part stay at a width, 0 or 1: those of the highest value, ties to the lower
    index. Of heads first whole KV heads, then as many query heads in each."""
    kept = torch.zeros_like(values)
    if not isinstance(width, Heads):
        kept[values.argsort(descending=True, stable=True)[:width]] = 1
        return kept
    heads = values.sum(1).argsort(descending=True, stable=True)[:width.kv]
    within = values[heads].argsort(dim=1, descending=True, stable=True)[:, :width.queries]
    kept[heads[:, None], within] = 1
    return kept


def _filled(widths: Sequence[BlockWidths], curves: Sequence[_Known], budget: Budget
            ) -> list[BlockWidths]:
    """The same with what the knapsack's grid left over spent: on the wider part that gains most
    for what it costs, as long as one fits."""
    found = list(widths)
    room = budget.limit - budget.cost.whole(found)
    while True:
        best: tuple[float, float, _Known, Width] | None = None
        for curve in curves:
            now = found[curve.block].of(curve.part)
            spent, lost = budget.cost.part(curve.block, curve.part, now), curve.at(now)
            for width in curve.widths:
                more = budget.cost.part(curve.block, curve.part, width) - spent
                if not 0 < more <= room or _size(width) <= _size(now):
                    continue
                gain = (lost - curve.at(width)) / more
                if best is None or gain > best[0]:
                    best = gain, more, curve, width
        if best is None:
            return found
        _, more, curve, width = best
        found[curve.block] = found[curve.block].having(width)
        room = budget.limit - budget.cost.whole(found)


def _size(width: Width) -> int:
    return width.total if isinstance(width, Heads) else width


def kept(arch: Architecture, widths: Sequence[BlockWidths], masks: Values) -> list[Kept]:
    """What stays of every block, by the masks of its parts; all of a part that has none."""
    found = []
    for block, (dense, own) in enumerate(zip(arch.blocks, widths, strict=True)):
        groups = tuple(range(dense.kv_heads))
        queries: tuple[tuple[int, ...], ...] = ()
        heads = masks.get(Part(block, "heads"))
        if heads is not None:
            groups = _where(heads.any(1))
            if own.group < dense.group:
                queries = tuple(_where(heads[group]) for group in groups)
        channels = masks.get(Part(block, "ffn"))
        found.append(Kept(groups, tuple(range(dense.intermediate)) if channels is None
                          else _where(channels), queries))
    return found


def _where(stays: torch.Tensor) -> tuple[int, ...]:
    return tuple(stays.nonzero().flatten().tolist())
