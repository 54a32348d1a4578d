"""Searched allocation: widths that change the model's output least for a budget.

What each width of each part costs is measured in `curves.py`, one part of one block at a time.
`solve` then picks a width for every part, so that the divergences add up to as little as possible
within the budget: a knapsack with one choice per part, by dynamic programming. That they add up is
an assumption; how far it holds is reported by those who use it, from the divergence of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from bipdeploy.model.cost import Cost, parameters
from bipdeploy.model.families import Architecture, BlockWidths

GRID = 1 << 13  # steps into which the budget is divided


@dataclass
class Curve:
    """Divergence of one part of a block by its width: KV heads of "heads", channels of "ffn"."""

    block: int
    part: str
    widths: list[int]
    divergences: list[float] = field(default_factory=list)

    def at(self, width: int) -> float:
        """The divergence at any width between those measured: linear, and never less at a lower
        width than at a higher one."""
        points = sorted(zip(self.widths, self.divergences, strict=True), reverse=True)
        highest, best = 0.0, []
        for measured, divergence in points:
            highest = max(highest, divergence)
            best.append((measured, highest))
        for (high, above), (low, below) in pairwise(best):
            if low <= width <= high:
                return above + (below - above) * (high - width) / (high - low)
        return best[-1][1] if width < best[-1][0] else best[0][1]


def solve(arch: Architecture, curves: Sequence[Curve],
          choices: Callable[[int, str], Sequence[int]], budget: float,
          cost: Cost | None = None) -> list[BlockWidths]:
    """Widths of every block: the least sum of divergences that costs at most `budget`.

    `choices(block, part)` are the widths that a part may take; parts without a curve stay dense.
    `cost`: what widths cost, in the budget's unit; parameters of the blocks by default. Costs are
    counted on a grid of the budget's 8192nd parts, which they are rounded to.
    """
    cost = cost or parameters(arch)
    fixed = cost.whole(arch.blocks)
    tables = []
    for curve in curves:
        widths = list(choices(curve.block, curve.part))
        sizes = [cost.part(curve.block, curve.part, width) for width in widths]
        fixed -= cost.part(curve.block, curve.part, _dense(arch, curve))
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
        return _widths(arch, curves, [min(widths) for widths, _, _ in tables])
    place, rows = GRID, []
    for (_, sizes, _), picked in zip(reversed(tables), reversed(taken), strict=True):
        rows.append(int(picked[place]))
        place -= round(sizes[rows[-1]] / unit)
    return _widths(arch, curves, [widths[row] for (widths, _, _), row
                                  in zip(tables, reversed(rows), strict=True)])


def _widths(arch: Architecture, curves: Sequence[Curve], chosen: Sequence[int]
            ) -> list[BlockWidths]:
    """The dense widths with the chosen ones in their places."""
    blocks = list(arch.blocks)
    for curve, width in zip(curves, chosen, strict=True):
        old, group = blocks[curve.block], arch.blocks[curve.block].group
        blocks[curve.block] = (BlockWidths(width * group, width, old.intermediate)
                               if curve.part == "heads" else
                               BlockWidths(old.heads, old.kv_heads, width))
    return blocks


def predicted(curves: Sequence[Curve], widths: Sequence[BlockWidths]) -> float:
    """The sum of divergences that the curves give for widths."""
    return sum(c.at(widths[c.block].kv_heads if c.part == "heads" else
                    widths[c.block].intermediate) for c in curves)


def _dense(arch: Architecture, curve: Curve) -> int:
    block = arch.blocks[curve.block]
    return block.kv_heads if curve.part == "heads" else block.intermediate


def solve_within(arch: Architecture, curves: Sequence[Curve],
                 choices: Callable[[int, str], Sequence[int]], budget: float, cost: Cost
                 ) -> list[BlockWidths]:
    """As `solve`, with the budget met whatever the grid rounds away."""
    asked = budget
    for _ in range(len(curves)):
        widths = solve(arch, curves, choices, asked, cost)
        over = cost.whole(widths) - budget
        if over <= 0:
            return widths
        asked -= over
    return _widths(arch, curves, [min(choices(c.block, c.part)) for c in curves])


def spaced(choices: Sequence[int], count: int) -> list[int]:
    """At most `count` of the ascending choices, evenly spread, first and last among them."""
    if len(choices) <= count:
        return list(choices)
    last = len(choices) - 1
    return [choices[round(i * last / (count - 1))] for i in range(count)]
