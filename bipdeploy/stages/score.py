"""Stage `score`: one walk over the calibration windows, a score for every group."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from bipdeploy.allocation import BlockScores
from bipdeploy.blocks import Block, BlockWalker
from bipdeploy.calibration import calibration_batches
from bipdeploy.checkpoint import opened
from bipdeploy.criteria import CRITERIA
from bipdeploy.criteria.llm_bip import head_bound, measured_change, rank_correlation
from bipdeploy.criteria.statistics import BlockView, Scores, Statistics
from bipdeploy.errors import InputError
from bipdeploy.recipe import Recipe
from bipdeploy.stages.job import Job

SCORES, SUMMARY = "scores.safetensors", "scores.json"


def run(job: Job) -> None:
    """Write `scores.safetensors` (block.N.heads, block.N.ffn) and `scores.json`."""
    recipe = job.recipe
    walker = BlockWalker(job.inputs["dense"], recipe.model)
    job.reporter.total(len(walker), "blocks")
    windows, provenance = calibration_batches(
        recipe, job.inputs["dense"], walker.architecture.max_positions)
    scores, agreement = score_blocks(walker, windows, recipe, job)
    tensors: dict[str, torch.Tensor] = {}
    for index, (heads, ffn) in enumerate(scores):
        tensors |= {f"block.{index}.heads": heads, f"block.{index}.ffn": ffn}
    save_file(tensors, job.out / SCORES)
    job.write(SUMMARY, {
        "criterion": recipe.score.criterion, "propagation": recipe.score.propagation,
        "comparable": CRITERIA[recipe.score.criterion].comparable,
        "source": CRITERIA[recipe.score.criterion].source,
        "calibration": provenance, "bound_against_measured": agreement})


@torch.no_grad()
def score_blocks(walker: BlockWalker, windows: list[torch.Tensor], recipe: Recipe,
                 job: Job | None = None) -> tuple[list[Scores], list[dict[str, float]]]:
    """Scores of every block, and per block how LLM-BIP's bound ranks beside the measurement.

    The second list is empty unless the heads were measured.
    """
    criterion = CRITERIA[recipe.score.criterion]
    function, needs = criterion.load(), criterion.statistics(recipe.score.propagation)
    generator = torch.Generator().manual_seed(recipe.seed)
    hidden = walker.embed(windows)
    scores, agreement = [], []
    for index, block in enumerate(walker.blocks(windows[0].shape[1])):
        widths = walker.architecture.blocks[index]
        statistics = Statistics(widths.kv_heads, needs, walker.config.rms_norm_eps)
        hidden = [_see(block, x, statistics) for x in hidden]
        view = BlockView(block, statistics, widths.kv_heads, widths.intermediate,
                         recipe.score.propagation, generator)
        scores.append(function(view))
        for kind, values in zip(("heads", "FFN channels"), scores[-1], strict=True):
            if not torch.isfinite(values).all():
                raise InputError(f"the scores of block {index}'s {kind} are not finite in "
                                 f"{walker.dtype}; set model.dtype to float32")
        if "measured" in needs and block.has_attention:
            bound, measured = head_bound(view), (statistics["measured"] / statistics.tokens).sqrt()
            agreement.append({
                "block": index, "rank_correlation": rank_correlation(bound, measured),
                "measured_above_bound": int((measured > bound).sum()),
                "mean_ratio": float((bound / measured.clamp_min(1e-30)).mean())})
        if job is not None:
            job.reporter.advance()
    return scores, agreement


def _see(block: Block, x: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    """Run a block on a batch and take in what the criterion needs; returns the block's output."""
    u = x
    if block.has_attention:
        attended = block.attention(x)
        u = attended.u
        statistics.see_attention(attended.z, u)
        if "measured" in statistics.needs:
            statistics.see_measured(measured_change(block, attended.z, u, statistics.groups))
    y = u
    if block.has_ffn:
        gate, up = block.ffn_parts(u)
        statistics.see_ffn(gate, up)
        y = u + block.down(gate * up)
    statistics.see_output(y)
    return y


def read_scores(folder: Path) -> list[BlockScores]:
    """The scores that the stage wrote, by block. Raises InputError where there are none."""
    path = folder / SCORES if folder.is_dir() else folder
    if not path.is_file():
        raise InputError(f"{folder} holds no {SCORES}; give what `bipdeploy score` wrote")
    with opened(path) as file:
        count = len({name.split(".")[1] for name in file.keys()})
        return [BlockScores(file.get_tensor(f"block.{i}.heads").tolist(),
                            file.get_tensor(f"block.{i}.ffn").tolist()) for i in range(count)]
