"""Stage `prune`: from scores to a smaller checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from bipdeploy.errors import InputError
from bipdeploy.measuring import profile
from bipdeploy.model.families import architecture, size_figures
from bipdeploy.planning import targets
from bipdeploy.planning.job import Job
from bipdeploy.pruning.allocation import allocate
from bipdeploy.pruning.kept import keep
from bipdeploy.pruning.search import Curve
from bipdeploy.pruning.sensitivity import weighted
from bipdeploy.running import artifacts
from bipdeploy.stages import curves
from bipdeploy.stages.evolve import evolved
from bipdeploy.stages.learned import learned
from bipdeploy.stages.score import SUMMARY, read_influence, read_scores, require_scores
from bipdeploy.stages.search import searched, write_sliced

KEPT = "kept.json"


def run(job: Job) -> None:
    """Write `model/` (the sliced checkpoint), `kept.json` and the size figures."""
    arch = job.dense.architecture
    scores = read_scores(job.inputs["score"])
    require_scores(job, scores)
    summary = artifacts.read_json(job.inputs["score"] / SUMMARY)
    dense = profile.timed(job.dense, job.reporter)
    job = replace(job, resolved=dense)
    _require_widths(job, summary)
    target, section = dense.target, job.recipe.prune
    details: dict[str, Any] = {}
    columns: list[dict[str, torch.Tensor]] = []
    if section.layers == "searched":
        widths, kept, details = searched(job, scores)
    elif section.layers == "learned":
        found = learned(job, scores, comparable=summary["comparable"])
        widths, kept, columns, details = found.widths, found.kept, found.columns, found.record
    elif section.layers == "evolved":
        widths, details = evolved(job, scores)
        kept = [keep(s, w) for s, w in zip(scores, widths, strict=True)]
    else:
        influence = read_influence(job.inputs["score"]) if section.depth.any else None
        ranked, comparable = scores, summary["comparable"]
        if section.needs_curves:
            details = {"search": curves.given(job, scores)}
            measured = [Curve.read(own, arch) for own in details["search"]["curves"]]
            ranked, comparable = weighted(arch, scores, measured), True
        allocated = partial(allocate, arch, scores=ranked, comparable=comparable,
                            one_scale=summary.get("one_scale", False), influence=influence,
                            tensor_parallel=job.recipe.hardware.tensor_parallel)
        section = targets.settled(arch, section, target, influence=influence,
                                  tensor_parallel=job.recipe.hardware.tensor_parallel,
                                  widths_of=lambda tried: allocated(section=tried)[0])
        widths, _ = allocated(section=section)
        kept = [keep(s, w) for s, w in zip(scores, widths, strict=True)]
    config = write_sliced(job, job.out / "model", kept, widths, columns)
    figures = size_figures(arch, architecture(config))
    job.write(KEPT, {
        "ratio": section.share or 1 - figures["block_parameters.ratio"],
        "target": target and target.record(widths), "layers": section.layers, **details,
        "model_type": config["model_type"],
        "dropped": {part: [i for i, (dense, own) in enumerate(zip(arch.blocks, widths, strict=True))
                           if getattr(dense, width) and not getattr(own, width)]
                    for part, width in (("attention", "kv_heads"), ("ffn", "intermediate"))},
        "blocks": [{"heads": w.heads, "kv_heads": w.kv_heads, "intermediate": w.intermediate,
                    "kept_groups": list(k.groups), "kept_channels": list(k.channels),
                    **({"kept_queries": list(map(list, k.queries))} if k.queries else {})}
                   for w, k in zip(widths, kept, strict=True)]})
    job.write_figures(figures | (target.figures(widths) if target else {}))


def _require_widths(job: Job, summary: Mapping[str, Any]) -> None:
    """Refuse scores that chose for other widths than these. Raises InputError."""
    if "widths" not in summary:
        return
    name, section = summary["criterion"], job.recipe.prune
    if section.layers != "uniform" or section.depth.any or [
            asdict(own) for own in job.dense.uniform] != summary["widths"]:
        raise InputError(f"the scores in {job.inputs['score']} are of {name}, which chooses for "
                         "the widths that it is told, and these are others; score the model again "
                         "with the same section prune (--set prune.ratio=…)")
