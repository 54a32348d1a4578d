"""Searched allocation: widths that change the model's output least for a budget.

Two steps. `measure` prunes one part of one block at a time (its heads, or its FFN), to a few
widths, lets the result run through the rest of the dense model, and takes the mean Kullback-Leibler
divergence of the next-token distributions from the dense ones. `solve` then picks a width for every
part, so that the divergences add up to as little as possible within the budget: a knapsack with one
choice per part, by dynamic programming. That they add up is an assumption; how far it holds is
reported by those who use it, from the divergence of the whole.

Shapes: B windows in a batch, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from bipdeploy.model import finite
from bipdeploy.model.activations import Batches, Keep, replace
from bipdeploy.model.blocks import BlockWalker
from bipdeploy.model.cost import Cost, parameters
from bipdeploy.model.families import Architecture, BlockWidths
from bipdeploy.pruning.allocation import BlockScores
from bipdeploy.pruning.allocation import keep as best
from bipdeploy.pruning.refit import RidgeProblem
from bipdeploy.pruning.slicing import expand

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


@torch.no_grad()
def measure(walker: BlockWalker, windows: list[torch.Tensor], scores: Sequence[BlockScores],
            widths: Callable[[int, str], Sequence[int]], *, refit: float | None,
            advance: Callable[[], None] = lambda: None, keep: Keep = list) -> list[Curve]:
    """The curves of every part that may be pruned; `widths(block, part)` says at which widths.

    One walk: each variant joins at its block and is carried through all later ones, so that
    every block is loaded once. `refit`: the ridge with which the part's output projection is
    refitted to the dense one's output, None for none.
    """
    curves: list[Curve] = []
    dense = walker.embed(windows, keep)
    carried: list[tuple[Curve, Batches]] = []
    for index, block in enumerate(walker.blocks(windows[0].shape[1])):
        for _, hidden in carried:
            replace(hidden, block)
        u_dense = dense
        if block.has_attention:
            curve = Curve(index, "heads", list(widths(index, "heads")))
            curves.append(curve)
            z = keep(block.attention(x).z for x in dense)
            u_dense = keep(x + block.output(part) for x, part in zip(dense, z, strict=True))
            size = block.output.in_features // walker.architecture.blocks[index].kv_heads
            for width in curve.widths:
                outputs = _reduced(block.output, z, _columns(scores[index], width, "heads", size),
                                   refit)
                carried.append((curve, keep(
                    u + block.ffn(u) if block.has_ffn else u
                    for u in (x + out for x, out in zip(dense, outputs, strict=True)))))
        dense = u_dense
        if block.has_ffn:
            curve = Curve(index, "ffn", list(widths(index, "ffn")))
            curves.append(curve)
            h = keep(gate * up for gate, up in map(block.ffn_parts, u_dense))
            for width in curve.widths:
                outputs = _reduced(block.down, h, _columns(scores[index], width, "ffn", 1), refit)
                carried.append((curve, keep(
                    u + out for u, out in zip(u_dense, outputs, strict=True))))
            dense = keep(u + block.down(part) for u, part in zip(u_dense, h, strict=True))
        del block  # the walk reads the next but one now
        advance()
    head = walker.head()
    totals = [0.0] * len(carried)
    for number in range(len(windows)):
        expected = head(dense[number]).float().log_softmax(-1)
        for variant, (_, hidden) in enumerate(carried):
            totals[variant] += divergence(head(hidden[number]).float().log_softmax(-1), expected)
    tokens = sum(batch.numel() for batch in windows)
    for (curve, _), total in zip(carried, totals, strict=True):  # in the order of their widths
        finite.require(f"divergences of block {curve.block}'s {curve.part}", [total], walker.dtype)
        curve.divergences.append(total / tokens)
    return curves


def _columns(scores: BlockScores, width: int, part: str, size: int) -> torch.Tensor:
    """Columns of the output projection that stay when the best `width` groups do."""
    kept = best(scores, BlockWidths(0, width, 0) if part == "heads" else BlockWidths(0, 0, width))
    return expand(kept.groups if part == "heads" else kept.channels, size)


def _reduced(projection: torch.nn.Linear, inputs: Batches, columns: torch.Tensor,
             refit: float | None) -> Iterator[torch.Tensor]:
    """What a projection gives from some of its inputs, refitted to what it gave from all."""
    if not len(columns):
        for z in inputs:
            yield torch.zeros_like(projection(z))
        return
    columns = columns.to(projection.weight.device)
    weight = projection.weight[:, columns]
    if refit is not None:
        problem = RidgeProblem(weight)
        for z in inputs:
            problem.see(z[..., columns], z @ projection.weight.T)
        weight = problem.solve(refit).to(weight.dtype)
        del problem
    for z in inputs:
        yield torch.nn.functional.linear(z[..., columns], weight, projection.bias)


def divergence(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Kullback-Leibler divergence of log-probabilities from the expected ones, summed over
    tokens, nats."""
    return float((expected.exp() * (expected - found)).sum(dtype=torch.float64))


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
