"""Stage `prune`: from scores to a smaller checkpoint."""

from __future__ import annotations

from bipdeploy import artifacts
from bipdeploy.allocation import allocate
from bipdeploy.checkpoint import Checkpoint, CheckpointWriter, require_finite
from bipdeploy.errors import InputError
from bipdeploy.families import architecture, size_figures
from bipdeploy.modeling.formats import pruned_config
from bipdeploy.slicing import slice_block
from bipdeploy.stages.job import Job
from bipdeploy.stages.score import SUMMARY, read_influence, read_scores

KEPT = "kept.json"


def run(job: Job) -> None:
    """Write `model/` (the sliced checkpoint), `kept.json` and the size figures."""
    dense = Checkpoint(job.inputs["dense"])
    arch = architecture(dense.config)
    scores = read_scores(job.inputs["score"])
    if len(scores) != len(arch.blocks) or any(
            (len(s.heads), len(s.ffn)) != (w.kv_heads, w.intermediate)
            for s, w in zip(scores, arch.blocks, strict=False)):
        raise InputError(f"the scores in {job.inputs['score']} are not of this model: blocks or "
                         "widths differ; score the model again")
    summary = artifacts.read_json(job.inputs["score"] / SUMMARY)
    section = job.recipe.prune
    influence = read_influence(job.inputs["score"]) if section.depth.any else None
    widths, kept = allocate(arch, section, scores, comparable=summary["comparable"],
                            one_scale=summary.get("one_scale", False), influence=influence,
                            tensor_parallel=job.recipe.hardware.tensor_parallel)
    job.reporter.total(len(arch.blocks), "blocks")
    config = pruned_config(dense.config, arch, widths)
    with CheckpointWriter(job.out / "model", config, dense.folder) as writer:
        outside = dense.tensors(dense.outside_blocks())
        require_finite(outside, dense.folder)  # scoring reads no final norm and no head
        writer.add(outside)
        for index, choice in enumerate(kept):
            writer.add(slice_block(dense.block(index), arch, index, choice),
                       f"model.layers.{index}.")
            job.reporter.advance()
    job.write(KEPT, {
        "ratio": section.ratio, "layers": section.layers,
        "model_type": config["model_type"],
        "dropped": {part: [i for i, (dense, own) in enumerate(zip(arch.blocks, widths, strict=True))
                           if getattr(dense, width) and not getattr(own, width)]
                    for part, width in (("attention", "kv_heads"), ("ffn", "intermediate"))},
        "blocks": [{"heads": w.heads, "kv_heads": w.kv_heads, "intermediate": w.intermediate,
                    "kept_groups": list(k.groups), "kept_channels": list(k.channels)}
                   for w, k in zip(widths, kept, strict=True)]})
    job.write_figures(size_figures(arch, architecture(config)))
