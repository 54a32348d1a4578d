"""Stage `curves`: what each width of each part costs the model's output, whatever the budget.

The same curves serve every ratio and every target, so they are measured once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bipdeploy.data.calibration import calibration_batches
from bipdeploy.errors import InputError
from bipdeploy.model.activations import keeping
from bipdeploy.model.blocks import BlockWalker
from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.model.families import Architecture, Heads, Width
from bipdeploy.planning.job import Job
from bipdeploy.pruning import curves, search
from bipdeploy.pruning.allocation import part_widths
from bipdeploy.pruning.kept import BlockScores
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.running import artifacts
from bipdeploy.running.reporter import Reporter
from bipdeploy.stages.recover import hold_back
from bipdeploy.stages.score import read_scores, require_scores

CURVES = "curves.json"


def run(job: Job) -> None:
    """Write `curves.json`: the `windows` that were judged by, and for every part of every block
    its `widths` and their `divergences`, nats per token. Where nothing needs them it says so."""
    if not job.recipe.prune.needs_curves:
        job.reporter.total(1)
        job.write(CURVES, {"measured": False})
        return
    scores = read_scores(job.inputs["score"])
    require_scores(job, scores)
    job.write(CURVES, measured(job.recipe, job.dense.checkpoint, scores, job.out, job.reporter))


def given(job: Job, scores: Sequence[BlockScores]) -> dict[str, Any]:
    """The record in the folder that is the input `curves`, or one measured now where a stage on
    plain paths is given none. Raises InputError for one of another model or other widths."""
    if "curves" not in job.inputs:
        return measured(job.recipe, job.dense.checkpoint, scores, job.out, job.reporter)
    folder, arch = job.inputs["curves"], job.dense.architecture
    path = folder / CURVES
    record = artifacts.read_json(path) if path.is_file() else {}
    if "curves" not in record:
        raise InputError(f"{folder} holds no measured curves; give what `bipdeploy curves` wrote")
    allowed = choices(job.recipe, arch)
    ends = {(block, part): (own[0], own[-1]) for block, dense in enumerate(arch.blocks)
            for part in ("heads", "ffn") if dense.of(part) not in (0, Heads(0, 0))
            and (own := allowed(block, part))}
    found = {(curve.block, curve.part): (curve.widths[0], curve.widths[-1]) for own in
             record["curves"] if own["block"] < len(arch.blocks)
             and (curve := search.Curve.read(own, arch))}
    if len(found) != len(record["curves"]) or found != ends:
        raise InputError(f"the curves in {folder} are of another model, or of other widths than "
                         "prune.heads, ffn, protect and round_to or hardware.tensor_parallel "
                         "allow; measure them again with the same settings")
    return record


def choices(recipe: Recipe, arch: Architecture) -> Callable[[int, str], list[Width]]:
    """The widths that a part of a block may have, whatever the budget, ascending."""
    # Whether the budget can be met is known of the dense model; a round's is another share.
    section = recipe.prune.model_copy(update={"ratio": None})
    return part_widths(arch, section, tensor_parallel=recipe.hardware.tensor_parallel)


def measured(recipe: Recipe, model: Checkpoint, scores: Sequence[BlockScores], work: Path,
             reporter: Reporter) -> dict[str, Any]:
    """What each width of each part costs, as `curves.json` holds it; hidden states that spill do
    so below `work`."""
    section, walker = recipe.prune.search, BlockWalker(model, recipe.model)
    arch, allowed = walker.architecture, choices(recipe, walker.architecture)
    drawn, _ = calibration_batches(recipe, model.folder, arch.max_positions)
    text = searched_text(recipe, torch.cat(drawn))
    sensed = section.propagation == "sensitivity"
    reporter.total((1 + sensed) * len(arch.blocks), "blocks searched")

    def widths(block: int, part: str) -> list[Width]:
        return search.spaced(allowed(block, part), section.points)

    if sensed:
        with keeping(work, recipe.calibration.spill,
                     (len(arch.blocks) + 2) * walker.bytes_of(text.batches)) as kept:
            found = curves.sensed(walker, text, scores, widths, recipe.seed, reporter.advance,
                                  kept)
    else:
        size = (2 * section.points * len(arch.blocks) * walker.bytes_of(text.judged)
                + 8 * walker.bytes_of(text.batches))
        with keeping(work, recipe.calibration.spill, size) as kept:
            found = curves.measured(walker, text, scores, widths, reporter.advance, kept)
    return {"windows": sum(map(len, text.judged)), "curves": [asdict(curve) for curve in found]}


def searched_text(recipe: Recipe, windows: torch.Tensor) -> curves.Text:
    """The calibration windows that a search judges by, and those that its refits see: [S, T]."""
    ridge = recipe.recover.fitting
    fits = ridge is not None
    judged = min(recipe.prune.search.windows, len(windows) // 2 if fits else len(windows))
    batch, held = recipe.calibration.batch, 0
    fitted = list(windows[:-judged].split(batch)) if fits else []
    if ridge == "auto":
        fitted, held = hold_back(fitted)
    return curves.Text(list(windows[-judged:].split(batch)), fitted, ridge, held)
