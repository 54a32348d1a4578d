"""Evolved allocation: levels of all parts by mutation and selection on the whole model's loss.

The search of DarwinLM (arXiv 2502.07780) without its training, which follows EvoPress
(arXiv 2410.14649). A candidate is a level, that is a width, for every part. Offspring of a parent
raise some parts' levels and lower others', so that the budget stays met; they are selected in
rounds, many by little text and few by more, and the best becomes the parent where it is better.
What levels do not add up to is measured, not assumed, at the price of a pass for each candidate.

As published: the start is what is next to uniform, levels come from a database of parts that were
pruned and refitted one by one, selection is by the Kullback-Leibler divergence from the dense
model, in rounds. Different: no candidate is trained before it is judged; the parent is judged too,
on all the text, and so never replaced by a worse one; parts of any kind trade parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

SWITCHES = 3  # of an offspring: the lesser of two draws up to this many
# Of a generation: the share of the windows that candidates are judged by, and the share of the
# offspring that are left of them; of the last the best.
ROUNDS = ((0.125, 0.25), (0.5, 0.125), (1.0, 0.0))

Levels = tuple[int, ...]  # by part; 0 is the narrowest
Judge = Callable[[Levels, float], float]  # loss of a candidate on a share of the windows


@dataclass(frozen=True)
class Space:
    """What the levels of every part cost, ascending, and the most they may cost together."""

    costs: Sequence[Sequence[float]]
    budget: float

    def spent(self, levels: Levels) -> float:
        return sum(own[level] for own, level in zip(self.costs, levels, strict=True))

    def fits(self, levels: Levels) -> bool:
        return self.spent(levels) <= self.budget * (1 + 1e-12)

    def wider(self, levels: Levels) -> list[int]:
        """The parts that could have one level more, whatever the budget."""
        return [part for part, own in enumerate(self.costs) if levels[part] + 1 < len(own)]


@dataclass(frozen=True)
class Evolved:
    """The best levels, and their loss on all windows at the start and after each generation."""

    levels: Levels
    losses: list[float]


def evolve(space: Space, start: Levels, judge: Judge, *, generations: int, offspring: int,
           generator: torch.Generator, advance: Callable[[], None] = lambda: None) -> Evolved:
    """The levels that `generations` of `offspring` each lead to from a start within the budget.

    Losses never rise from one generation to the next. The same generator gives the same levels.
    """
    start = filled(space, start, generator)
    parent, least = start, judge(start, 1.0)
    losses = [least]
    for _ in range(generations):
        drawn = (mutated(space, parent, generator) for _ in range(offspring))
        candidates = [own for own in dict.fromkeys(drawn) if own != parent]
        for windows, left in ROUNDS if candidates else ():
            found = {own: judge(own, windows) for own in candidates}
            candidates = sorted(candidates, key=found.__getitem__)[:max(1, int(left * offspring))]
        if candidates and found[candidates[0]] < least:
            parent, least = candidates[0], found[candidates[0]]
        losses.append(least)
        advance()
    return Evolved(parent, losses)


def mutated(space: Space, levels: Levels, generator: torch.Generator) -> Levels:
    """Some level switches: a part drawn gets a level more, and others drawn one less each until
    the budget is met again. What then is left of it goes to parts that it suffices for."""
    switches = min(1 + _drawn(SWITCHES, generator) for _ in range(2))
    for _ in range(switches):
        wider = space.wider(levels)
        if not wider:
            break
        raised = wider[_drawn(len(wider), generator)]
        tried = _moved(levels, raised, 1)
        while not space.fits(tried):
            others = [part for part, level in enumerate(tried) if level and part != raised]
            if not others:
                tried = levels  # this part alone is more than there is
                break
            tried = _moved(tried, others[_drawn(len(others), generator)], -1)
        levels = tried
    return filled(space, levels, generator)


def filled(space: Space, levels: Levels, generator: torch.Generator) -> Levels:
    """With levels more of parts drawn, one by one, until no more of any is within the budget."""
    while fitting := [part for part in space.wider(levels) if space.fits(_moved(levels, part, 1))]:
        levels = _moved(levels, fitting[_drawn(len(fitting), generator)], 1)
    return levels


def _moved(levels: Levels, part: int, by: int) -> Levels:
    return (*levels[:part], levels[part] + by, *levels[part + 1:])


def _drawn(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))
