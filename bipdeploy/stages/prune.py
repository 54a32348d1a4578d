"""Stage `prune`: from scores to a smaller checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bipdeploy.data.calibration import calibration_batches
from bipdeploy.errors import InputError
from bipdeploy.measuring import profile
from bipdeploy.model.activations import keeping
from bipdeploy.model.blocks import BlockWalker
from bipdeploy.model.checkpoint import Checkpoint, CheckpointWriter
from bipdeploy.model.families import BlockWidths, architecture, size_figures
from bipdeploy.model.formats import pruned_config
from bipdeploy.planning import targets
from bipdeploy.planning.job import Job
from bipdeploy.planning.resolved import Resolved
from bipdeploy.pruning import curves as cost_curves
from bipdeploy.pruning import search
from bipdeploy.pruning.allocation import BlockScores, allocate, keep, part_widths
from bipdeploy.pruning.slicing import slice_block
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.running import artifacts
from bipdeploy.stages.score import SUMMARY, read_influence, read_scores

KEPT = "kept.json"
SEARCH_RIDGE = 0.01  # of the refits that a search tries, where the recipe's own is `auto`


def run(job: Job) -> None:
    """Write `model/` (the sliced checkpoint), `kept.json` and the size figures."""
    arch = job.dense.architecture
    scores = read_scores(job.inputs["score"])
    if len(scores) != len(arch.blocks) or any(
            (len(s.heads), len(s.ffn)) != (w.kv_heads, w.intermediate)
            for s, w in zip(scores, arch.blocks, strict=False)):
        raise InputError(f"the scores in {job.inputs['score']} are not of this model: blocks or "
                         "widths differ; score the model again")
    summary = artifacts.read_json(job.inputs["score"] / SUMMARY)
    dense = profile.timed(job.dense, job.reporter)
    target, section = dense.target, job.recipe.prune
    details: dict[str, Any] = {}
    if section.layers == "searched":
        widths, details = searched(job, dense, scores)
        kept = [keep(s, w) for s, w in zip(scores, widths, strict=True)]
    else:
        influence = read_influence(job.inputs["score"]) if section.depth.any else None
        allocated = partial(allocate, arch, scores=scores, comparable=summary["comparable"],
                            one_scale=summary.get("one_scale", False), influence=influence,
                            tensor_parallel=job.recipe.hardware.tensor_parallel)
        section = targets.settled(arch, section, target, influence=influence,
                                  tensor_parallel=job.recipe.hardware.tensor_parallel,
                                  widths_of=lambda tried: allocated(section=tried)[0])
        widths, kept = allocated(section=section)
    job.reporter.total(len(arch.blocks), "blocks")
    config = pruned_config(dense.config, arch, widths)
    weights = dense.checkpoint
    with CheckpointWriter(job.out / "model", config, weights.folder) as writer:
        writer.add_outside_blocks(weights, finite=True)  # scoring reads no final norm and no head
        for index, choice in enumerate(kept):
            writer.add(slice_block(weights.block(index), arch, index, choice),
                       f"model.layers.{index}.")
            job.reporter.advance()
    figures = size_figures(arch, architecture(config))
    job.write(KEPT, {
        "ratio": section.share or 1 - figures["block_parameters.ratio"],
        "target": target and target.record(widths), "layers": section.layers, **details,
        "model_type": config["model_type"],
        "dropped": {part: [i for i, (dense, own) in enumerate(zip(arch.blocks, widths, strict=True))
                           if getattr(dense, width) and not getattr(own, width)]
                    for part, width in (("attention", "kv_heads"), ("ffn", "intermediate"))},
        "blocks": [{"heads": w.heads, "kv_heads": w.kv_heads, "intermediate": w.intermediate,
                    "kept_groups": list(k.groups), "kept_channels": list(k.channels)}
                   for w, k in zip(widths, kept, strict=True)]})
    job.write_figures(figures | (target.figures(widths) if target else {}))


def searched(job: Job, dense: Resolved, scores: Sequence[BlockScores]
             ) -> tuple[list[BlockWidths], dict[str, Any]]:
    """The widths that `search` finds for the budget, and what it measured.

    Curves that were measured before are the input `curves`.
    """
    arch, section, target = dense.architecture, dense.section, dense.target
    choices = dense.allowed
    if "curves" in job.inputs:
        record = artifacts.read_json(job.inputs["curves"])
        curves = [search.Curve(**curve) for curve in record["curves"]]
    else:
        walks = 2 if section.search.propagation == "sensitivity" else 1
        job.reporter.total(walks * len(arch.blocks), "blocks searched")
        curves, windows = measured_curves(job.recipe, dense.checkpoint, scores, job.out,
                                          job.reporter.advance)
        record = curves_record(curves, windows)
    if target:
        widths = search.solve_within(arch, curves, choices, target.limit, target.cost)
    else:
        total = sum(arch.block_parameters(i) for i in range(len(arch.blocks)))
        assert section.ratio is not None
        widths = search.solve(arch, curves, choices, total * (1 - section.ratio))
    return widths, {"search": {
        **record,
        # Sums of what single parts cost: what they cost together is for `evaluate` to say.
        "divergence": search.predicted(curves, widths),
        "divergence_uniform": search.predicted(curves, dense.uniform)}}


def measured_curves(recipe: Recipe, dense: Checkpoint, scores: Sequence[BlockScores], work: Path,
                    advance: Callable[[], None]) -> tuple[list[search.Curve], int]:
    """What each width of each part costs, whatever the ratio, and on how many windows; hidden
    states that spill do so below `work`."""
    section, walker = recipe.prune, BlockWalker(dense, recipe.model)
    arch = walker.architecture
    choices = part_widths(arch, section, tensor_parallel=recipe.hardware.tensor_parallel)
    drawn, _ = calibration_batches(recipe, dense.folder, arch.max_positions)
    text = searched_text(recipe, torch.cat(drawn))

    def widths(block: int, part: str) -> list[int]:
        return search.spaced(choices(block, part), section.search.points)

    if section.search.propagation == "sensitivity":
        with keeping(work, recipe.calibration.spill,
                     (len(arch.blocks) + 2) * walker.bytes_of(text.batches)) as kept:
            curves = cost_curves.sensed(walker, text, scores, widths, recipe.seed, advance, kept)
    else:
        size = (2 * section.search.points * len(arch.blocks) * walker.bytes_of(text.judged)
                + 8 * walker.bytes_of(text.batches))
        with keeping(work, recipe.calibration.spill, size) as kept:
            curves = cost_curves.measured(walker, text, scores, widths, advance, kept)
    return curves, sum(map(len, text.judged))


def searched_text(recipe: Recipe, windows: torch.Tensor) -> cost_curves.Text:
    """The calibration windows that a search judges by, and those that its refits see: [S, T]."""
    ridge = recipe.recover.refit.ridge
    refitted = recipe.recover.method == "refit"
    judged = min(recipe.prune.search.windows, len(windows) // 2 if refitted else len(windows))
    batch = recipe.calibration.batch
    return cost_curves.Text(list(windows[-judged:].split(batch)),
                            list(windows[:-judged].split(batch)) if refitted else [],
                            (SEARCH_RIDGE if ridge == "auto" else ridge) if refitted else None)


def curves_record(curves: Sequence[search.Curve], windows: int) -> dict[str, Any]:
    """Curves as JSON data: what `kept.json` holds of them, and the input `curves`."""
    return {"windows": windows, "curves": [asdict(curve) for curve in curves]}
