"""Widths by search, for stage `prune`: what each width costs is measured, then the budget is met.

With `prune.search.rounds` the budget is met part of the way, the model sliced and repaired as far
as that, and what is left scored and measured anew there: effects of parts do not add up.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bipdeploy.data.calibration import calibration_batches
from bipdeploy.model.activations import keeping
from bipdeploy.model.blocks import BlockWalker
from bipdeploy.model.checkpoint import Checkpoint, CheckpointWriter
from bipdeploy.model.families import Architecture, BlockWidths, Width
from bipdeploy.model.formats import pruned_config
from bipdeploy.planning.job import Job
from bipdeploy.pruning import curves as cost_curves
from bipdeploy.pruning import search
from bipdeploy.pruning.allocation import part_widths
from bipdeploy.pruning.kept import BlockScores, Kept, keep
from bipdeploy.pruning.slicing import slice_block
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.running import artifacts
from bipdeploy.running.reporter import Reporter
from bipdeploy.stages import score
from bipdeploy.stages.recover import hold_back
from bipdeploy.stages.repairs import REPAIRS


def searched(job: Job, scores: Sequence[BlockScores]
             ) -> tuple[list[BlockWidths], list[Kept], dict[str, Any]]:
    """The widths that a search finds for the budget, what stays at them, and what it measured.

    Curves that were measured before are the input `curves`.
    """
    dense, rounds, model = job.dense, job.dense.section.search.rounds, job.dense.checkpoint
    record, uniform, divergences = {}, 0.0, []
    kept: list[Kept] | None = None
    for number in range(1, rounds + 1):
        if number == 1 and "curves" in job.inputs:
            own = artifacts.read_json(job.inputs["curves"])
        else:
            own = curves_record(*measured_curves(job.recipe, model, scores, job.out, job.reporter))
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
    choices = width_choices(job.recipe, arch)
    if target := dense.target:
        limit = target.dense + (target.limit - target.dense) * part
        return search.solve_within(arch, curves, choices, limit, target.cost)
    total = sum(map(dense.architecture.block_parameters, range(len(arch.blocks))))
    assert dense.section.ratio is not None
    return search.solve(arch, curves, choices, total * (1 - dense.section.ratio * part))


def width_choices(recipe: Recipe, arch: Architecture) -> Callable[[int, str], list[Width]]:
    """The widths that a part ("heads", "ffn") of a block may have, ascending."""
    # Whether the budget can be met is known of the dense model; a round's is another share.
    section = recipe.prune.model_copy(update={"ratio": None})
    return part_widths(arch, section, tensor_parallel=recipe.hardware.tensor_parallel)


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


def write_sliced(job: Job, folder: Path, kept: Sequence[Kept], widths: Sequence[BlockWidths]
                 ) -> dict[str, Any]:
    """Write the dense model with only some of its groups; returns its config."""
    dense, weights, arch = job.dense, job.dense.checkpoint, job.dense.architecture
    job.reporter.total(len(kept), "blocks")
    config = pruned_config(dense.config, arch, widths)
    with CheckpointWriter(folder, config, weights.folder) as writer:
        writer.add_outside_blocks(weights, finite=True)  # scoring reads no final norm and no head
        for index, choice in enumerate(kept):
            writer.add(slice_block(weights.block(index), arch, index, choice),
                       f"model.layers.{index}.")
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


def measured_curves(recipe: Recipe, model: Checkpoint, scores: Sequence[BlockScores], work: Path,
                    reporter: Reporter) -> tuple[list[search.Curve], int]:
    """What each width of each part costs, whatever the ratio, and on how many windows; hidden
    states that spill do so below `work`."""
    section, walker = recipe.prune.search, BlockWalker(model, recipe.model)
    arch, choices = walker.architecture, width_choices(recipe, walker.architecture)
    drawn, _ = calibration_batches(recipe, model.folder, arch.max_positions)
    text = searched_text(recipe, torch.cat(drawn))
    sensed = section.propagation == "sensitivity"
    reporter.total((1 + sensed) * len(arch.blocks), "blocks searched")

    def widths(block: int, part: str) -> list[Width]:
        return search.spaced(choices(block, part), section.points)

    if sensed:
        with keeping(work, recipe.calibration.spill,
                     (len(arch.blocks) + 2) * walker.bytes_of(text.batches)) as kept:
            curves = cost_curves.sensed(walker, text, scores, widths, recipe.seed,
                                        reporter.advance, kept)
    else:
        size = (2 * section.points * len(arch.blocks) * walker.bytes_of(text.judged)
                + 8 * walker.bytes_of(text.batches))
        with keeping(work, recipe.calibration.spill, size) as kept:
            curves = cost_curves.measured(walker, text, scores, widths, reporter.advance, kept)
    return curves, sum(map(len, text.judged))


def searched_text(recipe: Recipe, windows: torch.Tensor) -> cost_curves.Text:
    """The calibration windows that a search judges by, and those that its refits see: [S, T]."""
    ridge = recipe.recover.refit.ridge
    refitted = recipe.recover.method == "refit"
    judged = min(recipe.prune.search.windows, len(windows) // 2 if refitted else len(windows))
    batch, held = recipe.calibration.batch, 0
    fitted = list(windows[:-judged].split(batch)) if refitted else []
    if refitted and ridge == "auto":
        fitted, held = hold_back(fitted)
    return cost_curves.Text(list(windows[-judged:].split(batch)), fitted,
                            ridge if refitted else None, held)


def curves_record(curves: Sequence[search.Curve], windows: int) -> dict[str, Any]:
    """Curves as JSON data: what `kept.json` holds of them, and the input `curves`."""
    return {"windows": windows, "curves": [asdict(curve) for curve in curves]}
