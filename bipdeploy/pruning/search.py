"""Searched allocation: widths that change the model's output least for a budget.

What each width of each part costs is measured in `curves.py`, one part of one block at a time.
`solve` then picks a width for every part, so that the divergences add up to as little as possible
within the budget: a knapsack with one choice per part, by dynamic programming. That they add up is
an assumption; how far it holds is reported by those who use it, from the divergence of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from statistics import fmean
from typing import Any

import torch

from bipdeploy.model.cost import Cost, parameters
from bipdeploy.model.families import Architecture, BlockWidths, Heads, Width

GRID = 1 << 13  # steps into which the budget is divided


@dataclass
class Curve:
    """Divergence of one part of a block by its width: `Heads` of "heads", channels of "ffn"."""

    block: int
    part: str
    widths: list[Width]
    divergences: list[float] = field(default_factory=list)

    @classmethod
    def read(cls, record: Mapping[str, Any], arch: Architecture) -> Curve:
        """A curve from JSON. Heads are pairs there; an older record has KV heads alone, which
        had all their query heads."""
        block, part = record["block"], record["part"]
        widths: list[Width] = list(record["widths"])
        if part == "heads":
            widths = [Heads(own, arch.blocks[block].group) if isinstance(own, int) else Heads(*own)
                      for own in widths]
        return cls(block, part, widths, list(record["divergences"]))

    def at(self, width: Width) -> float:
        """The divergence at any width between those measured: linear in the channels or the query
        heads, and never less at a lower width than at a higher one. Heads are lower where neither
        KV heads nor the query heads of each are more."""
        points = list(zip(self.widths, self.divergences, strict=True))
        if not isinstance(width, Heads):
            return _between(((own, lost) for own, lost in points if isinstance(own, int)), width)
        measured = {own: lost for own, lost in points if isinstance(own, Heads)}
        if {own.queries for own in measured} == {width.queries}:  # whole KV heads alone
            return _between(((own.kv, lost) for own, lost in measured.items()), width.kv)
        by_total: dict[int, list[float]] = {}
        for own, lost in measured.items():
            by_total.setdefault(own.total, []).append(lost)
        along = _between(((total, fmean(own)) for total, own in by_total.items()), width.total)

        def least(heads: Heads) -> float:
            return max((lost for own, lost in measured.items() if _within(heads, own)), default=0.0)

        most = min((least(own) for own in measured if _within(own, width)), default=inf)
        return min(max(along, least(width)), most)


def _within(inner: Heads, outer: Heads) -> bool:
    return inner.kv <= outer.kv and inner.queries <= outer.queries


def _between(points: Iterable[tuple[int, float]], width: int) -> float:
    """On the lines between points (width, divergence), which first are made to never fall as the
    width falls."""
    highest, best = 0.0, []
    for measured, divergence in sorted(points, reverse=True):
        highest = max(highest, divergence)
        best.append((measured, highest))
    for (high, above), (low, below) in pairwise(best):
        if low <= width <= high:
            return above + (below - above) * (high - width) / (high - low)
    return best[-1][1] if width < best[-1][0] else best[0][1]


def solve(arch: Architecture, curves: Sequence[Curve],
          choices: Callable[[int, str], Sequence[Width]], budget: float,
          cost: Cost | None = None) -> list[BlockWidths]:
    """Widths of every block: the least sum of divergences that costs at most `budget`.

    `choices(block, part)` are the widths that a part may take, the least first; parts without a
    curve stay dense. `cost`: what widths cost, in the budget's unit; parameters of the blocks by
    default. Costs are counted on a grid of the budget's 8192nd parts, which they are rounded to.
    """
    cost = cost or parameters(arch)
    fixed = cost.whole(arch.blocks)
    tables = []
    for curve in curves:
        widths = list(choices(curve.block, curve.part))
        sizes = [cost.part(curve.block, curve.part, width) for width in widths]
        fixed -= cost.part(curve.block, curve.part, arch.blocks[curve.block].of(curve.part))
        tables.append((widths, sizes, [curve.at(width) for width in widths]))
    room = budget - fixed
    if room < sum(min(sizes) for _, sizes, _ in tables):
        raise ValueError("the budget is below what the smallest widths need")
    unit = room / GRID
    best = torch.zeros(GRID + 1, dtype=torch.float64)  # least cost by grid steps at most used
    taken = []
    for widths, sizes, costs in tables:
        totals = torch.full((len(widths), GRID + 1), torch.inf, dtype=torch.float64)
        for row, (size, lost) in enumerate(zip(sizes, costs, strict=True)):
            steps = round(size / unit)
            if steps <= GRID:
                totals[row, steps:] = best[:GRID + 1 - steps] + lost
        best, picked = totals.min(0)
        taken.append(picked)
    if not torch.isfinite(best[GRID]):  # by rounding alone: the smallest widths just fit
        return _widths(arch, curves, [widths[0] for widths, _, _ in tables])
    place, rows = GRID, []
    for (_, sizes, _), picked in zip(reversed(tables), reversed(taken), strict=True):
        rows.append(int(picked[place]))
        place -= round(sizes[rows[-1]] / unit)
    return _widths(arch, curves, [widths[row] for (widths, _, _), row
                                  in zip(tables, reversed(rows), strict=True)])


def _widths(arch: Architecture, curves: Sequence[Curve], chosen: Sequence[Width]
            ) -> list[BlockWidths]:
    """The dense widths with the chosen ones in their places."""
    blocks = list(arch.blocks)
    for curve, width in zip(curves, chosen, strict=True):
        blocks[curve.block] = blocks[curve.block].having(width)
    return blocks


def predicted(curves: Sequence[Curve], widths: Sequence[BlockWidths]) -> float:
    """The sum of divergences that the curves give for widths."""
    return sum(c.at(widths[c.block].of(c.part)) for c in curves)


def solve_within(arch: Architecture, curves: Sequence[Curve],
                 choices: Callable[[int, str], Sequence[Width]], budget: float, cost: Cost
                 ) -> list[BlockWidths]:
    """As `solve`, with the budget met whatever the grid rounds away."""
    asked = budget
    for _ in range(len(curves)):
        widths = solve(arch, curves, choices, asked, cost)
        over = cost.whole(widths) - budget
        if over <= 0:
            return widths
        asked -= over
    return _widths(arch, curves, [choices(c.block, c.part)[0] for c in curves])


def spaced(choices: Sequence[Width], count: int) -> list[Width]:
    """At most `count` of the ascending choices, evenly spread, first and last among them."""
    if len(choices) <= count:
        return list(choices)
    last = len(choices) - 1
    return [choices[round(i * last / (count - 1))] for i in range(count)]
