"""Widths by search, for stage `prune`: the budget is met by what stage `curves` measured.

With `prune.search.rounds` the budget is met part of the way, the model sliced and repaired as far
as that, and what is left scored and measured anew there: effects of parts do not add up.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bipdeploy.data.calibration import calibration_batches
from bipdeploy.model.activations import keeping
from bipdeploy.model.blocks import BlockWalker
from bipdeploy.model.checkpoint import Checkpoint, CheckpointWriter
from bipdeploy.model.families import BlockWidths
from bipdeploy.model.formats import pruned_config
from bipdeploy.planning.job import Job
from bipdeploy.pruning import search
from bipdeploy.pruning.kept import BlockScores, Kept, keep
from bipdeploy.pruning.slicing import scale_columns, slice_block
from bipdeploy.stages import curves as measuring
from bipdeploy.stages import score
from bipdeploy.stages.repairs import REPAIRS


def searched(job: Job, scores: Sequence[BlockScores]
             ) -> tuple[list[BlockWidths], list[Kept], dict[str, Any]]:
    """The widths that a search finds for the budget, what stays at them, and what it measured.

    The first round's curves are the input `curves`; without one they are measured here.
    """
    dense, rounds, model = job.dense, job.dense.section.search.rounds, job.dense.checkpoint
    record, uniform, divergences = {}, 0.0, []
    kept: list[Kept] | None = None
    for number in range(1, rounds + 1):
        if number == 1:
            own = measuring.given(job, scores)
        else:
            own = measuring.measured(job.recipe, model, scores, job.out, job.reporter)
        curves = [search.Curve.read(curve, model.architecture) for curve in own["curves"]]
        widths = _solved(job, model, curves, number / rounds)
        divergences.append(search.predicted(curves, widths))
        if number == 1:
            record, uniform = own, search.predicted(curves, dense.uniform)
        chosen = [keep(s, w) for s, w in zip(scores, widths, strict=True)]
        kept = chosen if kept is None else list(map(Kept.then, kept, chosen))
        if number < rounds:
            model = _repaired(job, kept, widths)
            scores = _scored(job, model)
    shutil.rmtree(job.out / "rounds", ignore_errors=True)
    assert kept is not None
    return widths, kept, {"search": {
        **record,
        # Sums of what single parts cost: what they cost together is for `evaluate` to say.
        "divergence": sum(divergences), "divergence_uniform": uniform,
        "divergence_by_round": divergences}}


def _solved(job: Job, model: Checkpoint, curves: Sequence[search.Curve], part: float
            ) -> list[BlockWidths]:
    """The widths that meet a part of the way to the budget, at most those that the model has."""
    dense, arch = job.dense, model.architecture
    choices = measuring.choices(job.recipe, arch)
    if target := dense.target:
        limit = target.dense + (target.limit - target.dense) * part
        return search.solve_within(arch, curves, choices, limit, target.cost)
    total = sum(map(dense.architecture.block_parameters, range(len(arch.blocks))))
    assert dense.section.ratio is not None
    return search.solve(arch, curves, choices, total * (1 - dense.section.ratio * part))


def _repaired(job: Job, kept: Sequence[Kept], widths: Sequence[BlockWidths]) -> Checkpoint:
    """The dense model sliced so far, and repaired as the recipe says."""
    work = job.out / "rounds"
    shutil.rmtree(work, ignore_errors=True)
    write_sliced(job, work / "model", kept, widths)
    own = Job(job.recipe, {"dense": job.dense.dense, "sliced": work / "model"}, work / "repaired",
              job.reporter, job.resolved)
    own.out.mkdir()
    REPAIRS[job.recipe.recover.method].load()(own)
    made = own.out / "model"
    return Checkpoint(made if made.is_dir() else work / "model")


def write_sliced(job: Job, folder: Path, kept: Sequence[Kept], widths: Sequence[BlockWidths],
                 columns: Sequence[Mapping[str, torch.Tensor]] = ()) -> dict[str, Any]:
    """Write the dense model with only some of its groups; returns its config. `columns`: what the
    inputs of each block's output projections are multiplied by, see `scale_columns`."""
    dense, weights, arch = job.dense, job.dense.checkpoint, job.dense.architecture
    job.reporter.total(len(kept), "blocks")
    config = pruned_config(dense.config, arch, widths)
    with CheckpointWriter(folder, config, weights.folder) as writer:
        writer.add_outside_blocks(weights, finite=True)  # scoring reads no final norm and no head
        for index, choice in enumerate(kept):
            tensors = weights.block(index)
            if columns:
                tensors = scale_columns(tensors, arch, columns[index])
            writer.add(slice_block(tensors, arch, index, choice), f"model.layers.{index}.")
            job.reporter.advance()
    return config


def _scored(job: Job, model: Checkpoint) -> list[BlockScores]:
    """The scores of a model that was sliced so far, by the recipe's criterion."""
    recipe, walker = job.recipe, BlockWalker(model, job.recipe.model)
    drawn, _ = calibration_batches(recipe, job.dense.dense, walker.architecture.max_positions)
    job.reporter.total(len(walker) * score.walks([recipe.score]), "blocks scored again")
    with keeping(job.out, recipe.calibration.spill,
                 score.kept_bytes(walker, drawn, [recipe.score])) as kept:
        found = score.score_blocks(walker, drawn, recipe, job, kept)
    return [BlockScores(*(values.tolist() for values in own)) for own in found.scores]
