"""Widths by evolution, for stage `prune`: the whole model is judged with widths put in."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from bipdeploy.data.calibration import calibration_batches
from bipdeploy.model import cost
from bipdeploy.model.blocks import BlockWalker
from bipdeploy.model.families import Architecture, BlockWidths, Width
from bipdeploy.planning.job import Job
from bipdeploy.pruning import evolution, search
from bipdeploy.pruning.evolution import Levels
from bipdeploy.pruning.kept import BlockScores
from bipdeploy.pruning.stitching import stitched
from bipdeploy.stages.curves import choices, searched_text

Place = tuple[int, str]  # a block and its part, "heads" or "ffn"


def evolved(job: Job, scores: Sequence[BlockScores]) -> tuple[list[BlockWidths], dict[str, Any]]:
    """The widths that evolve within the budget, and how their divergence from the dense model
    fell, in nats per token of the windows that are judged."""
    recipe, section, dense = job.recipe, job.recipe.prune.search, job.dense
    walker = BlockWalker(dense.checkpoint, recipe.model)
    drawn, _ = calibration_batches(recipe, dense.dense, walker.architecture.max_positions)
    text = searched_text(recipe, torch.cat(drawn))
    job.reporter.total(len(walker) + section.generations, "blocks and generations")
    levels, space, start = _space(job)
    model = stitched(walker, text, scores, lambda block, part: levels.get((block, part), []),
                     job.reporter.advance)

    def widths(chosen: Levels) -> list[BlockWidths]:
        return widths_of(walker.architecture, levels, chosen)

    found = evolution.evolve(
        space, start, lambda chosen, share: model.divergence(widths(chosen), share),
        generations=section.generations, offspring=section.offspring,
        generator=torch.Generator().manual_seed(recipe.seed), advance=job.reporter.advance)
    return widths(found.levels), {"search": {
        "windows": sum(map(len, text.judged)), "generations": section.generations,
        "offspring": section.offspring, "divergence": found.losses[-1],
        "divergence_start": found.losses[0], "divergence_by_generation": found.losses}}


def widths_of(arch: Architecture, levels: dict[Place, list[Width]], chosen: Levels
              ) -> list[BlockWidths]:
    """The dense widths with the chosen levels in their places."""
    blocks = list(arch.blocks)
    for ((block, _), own), level in zip(levels.items(), chosen, strict=True):
        blocks[block] = blocks[block].having(own[level])
    return blocks


def _space(job: Job) -> tuple[dict[Place, list[Width]], evolution.Space, Levels]:
    """The levels of every part that has several, what they cost, and those next to uniform ones
    that the budget allows: a knapsack in which every share lost costs its square."""
    dense, arch = job.dense, job.dense.architecture
    spent = dense.target.cost if dense.target else cost.parameters(arch)
    allowed, points = choices(job.recipe, arch), job.recipe.prune.search.points
    levels: dict[Place, list[Width]] = {}
    for block, widths in enumerate(arch.blocks):
        for part in ("heads", "ffn"):
            own = search.spaced(allowed(block, part), points) if _size(widths.of(part)) else []
            if len(own) > 1:
                levels[block, part] = sorted(own, key=partial(spent.part, block, part))
    if dense.target:
        limit = dense.target.limit
    else:
        assert dense.section.ratio is not None
        limit = spent.whole(arch.blocks) * (1 - dense.section.ratio)
    even = [search.Curve(block, part, own, [
        (1 - _size(width) / _size(arch.blocks[block].of(part))) ** 2 for width in own])
        for (block, part), own in levels.items()]
    start = search.solve_within(arch, even, lambda b, p: levels[b, p], limit, spent)
    costs = [[spent.part(block, part, width) for width in own]
             for (block, part), own in levels.items()]
    fixed = spent.whole(arch.blocks) - sum(
        spent.part(block, part, arch.blocks[block].of(part)) for block, part in levels)
    return (levels, evolution.Space(costs, limit - fixed),
            tuple(own.index(start[block].of(part)) for (block, part), own in levels.items()))


def _size(width: Width) -> int:
    return width if isinstance(width, int) else width.total
