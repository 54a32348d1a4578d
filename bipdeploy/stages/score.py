"""Stage `score`: a walk over the calibration windows, a score for every group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from dataclasses import replace as altered
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from bipdeploy.data.calibration import calibration_batches
from bipdeploy.errors import InputError
from bipdeploy.measuring import profile
from bipdeploy.model import finite, sources
from bipdeploy.model.activations import Batches, Keep, keeping, replace
from bipdeploy.model.blocks import Block, BlockWalker
from bipdeploy.model.checkpoint import opened
from bipdeploy.model.families import BlockWidths
from bipdeploy.model.walk import require_agreement
from bipdeploy.planning.job import Job
from bipdeploy.planning.resolved import Resolved
from bipdeploy.pruning.criteria.gradients import blocks_backwards
from bipdeploy.pruning.criteria.llm_bip import head_bound, measured_change, rank_correlation
from bipdeploy.pruning.criteria.statistics import BlockView, Scores, Statistics
from bipdeploy.pruning.criteria.table import CRITERIA
from bipdeploy.pruning.depth import Influence
from bipdeploy.pruning.kept import BlockScores
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.recipe.score import ScoreSection
from bipdeploy.running import artifacts

SCORES, SUMMARY = "scores.safetensors", "scores.json"


class Walked(NamedTuple):
    """What a walk found, by block.

    agreement: how LLM-BIP's bound ranks beside the measurement, where heads were measured.
    influence: of the attention, the FFN and the whole block on the residual stream, [3].
    """

    scores: list[Scores]
    agreement: list[dict[str, float]]
    influence: list[torch.Tensor]


def run(job: Job) -> None:
    """Write `scores.safetensors` (block.N.heads, .ffn, .queries, .influence) and `scores.json`."""
    recipe = job.recipe
    if CRITERIA[recipe.score.criterion].counts:  # a speed that is asked for decides widths by times
        job = altered(job, resolved=profile.timed(job.dense, job.reporter))
    walker = BlockWalker(job.dense.checkpoint, recipe.model)
    job.reporter.total(len(walker) * walks([recipe.score]), "blocks")
    windows, provenance = calibration_batches(
        recipe, job.inputs["dense"], walker.architecture.max_positions)
    for note in (sources.provenance(walker.checkpoint.folder), job.dense.text_note):
        if note:
            job.reporter.note(note)
    require_agreement(walker, recipe.seed)
    size = kept_bytes(walker, windows, [recipe.score])
    with keeping(job.out, recipe.calibration.spill, size) as keep:
        walked = score_blocks(walker, windows, recipe, job, keep)
    write(job.out, recipe.score, walked, provenance, widths_for(job.dense))


def widths_for(resolved: Resolved) -> Sequence[BlockWidths] | None:
    """The widths that a recipe's criterion chooses for; None where it ranks for all."""
    return resolved.uniform if CRITERIA[resolved.recipe.score.criterion].counts else None


def write(folder: Path, section: ScoreSection, walked: Walked, provenance: dict[str, Any],
          widths: Sequence[BlockWidths] | None = None) -> None:
    """Write what later stages read of one criterion; `widths`: those that it chose for."""
    criterion = CRITERIA[section.criterion]
    tensors: dict[str, torch.Tensor] = {}
    for index, (own, influence) in enumerate(zip(walked.scores, walked.influence, strict=True)):
        # Copied: without groups of query heads theirs are those of the KV heads, one tensor.
        tensors |= {f"block.{index}.{kind}": values.clone()
                    for kind, values in own._asdict().items()}
        tensors[f"block.{index}.influence"] = influence
    save_file(tensors, folder / SCORES)
    artifacts.write_json(folder / SUMMARY, {
        "criterion": section.criterion, "propagation": section.propagation,
        "comparable": criterion.comparable, "one_scale": criterion.one_scale,
        "source": criterion.source,
        "calibration": provenance, "bound_against_measured": walked.agreement,
        **({"widths": [asdict(own) for own in widths]} if widths else {})})


def walks(sections: Sequence[ScoreSection]) -> int:
    """How often the model is walked for some criteria together: backwards too for gradients."""
    return 1 + any("gradients" in CRITERIA[s.criterion].needs for s in sections)


def kept_bytes(walker: BlockWalker, windows: list[torch.Tensor],
               sections: Sequence[ScoreSection]) -> int:
    """Bytes of the hidden states that scoring keeps: a walk back reads those of every block."""
    return (len(walker) + 2 if walks(sections) > 1 else 1) * walker.bytes_of(windows)


def score_blocks(walker: BlockWalker, windows: list[torch.Tensor], recipe: Recipe,
                 job: Job | None = None, keep: Keep = list) -> Walked:
    """Scores and influence of every block by the recipe's criterion."""
    return score_together(walker, windows, [recipe.score], recipe.seed,
                          job.reporter.advance if job is not None else lambda: None, keep,
                          [widths_for(job.dense) if job is not None else None])[0]


@torch.no_grad()
def score_together(walker: BlockWalker, windows: list[torch.Tensor],
                   sections: Sequence[ScoreSection], seed: int,
                   advance: Callable[[], None] = lambda: None, keep: Keep = list,
                   widths: Sequence[Sequence[BlockWidths] | None] | None = None) -> list[Walked]:
    """Scores and influence of every block, for each of several criteria as if it were alone.

    `widths`: by criterion those of all blocks that it is to choose for, None to rank for all.
    One walk collects the statistics of all; criteria that need gradients share one more, back.
    """
    inputs: list[Batches] = []
    found = _forwards(walker, windows, sections, seed, advance, inputs, keep,
                      widths or [None] * len(sections))
    if inputs:
        _backwards(walker, windows, sections, found, advance, inputs)
    return found


def _forwards(walker: BlockWalker, windows: list[torch.Tensor], sections: Sequence[ScoreSection],
              seed: int, advance: Callable[[], None], inputs: list[Batches], keep: Keep,
              chosen_for: Sequence[Sequence[BlockWidths] | None]) -> list[Walked]:
    """The walk that collects statistics. What a walk back reads goes to `inputs`, on the CPU."""
    own_needs = [CRITERIA[s.criterion].statistics(s.propagation) for s in sections]
    needs = frozenset().union(*own_needs)
    draws = [torch.Generator().manual_seed(seed) for _ in sections]
    hidden = walker.embed(windows, keep, shared=True)
    found = [Walked([], [], []) for _ in sections]
    for index, block in enumerate(walker.blocks(windows[0].shape[1])):
        widths = walker.architecture.blocks[index]
        if "gradients" in needs:
            inputs.append(keep(x.cpu() for x in hidden))
        statistics = _seen(walker, block, hidden, Statistics(
            widths.kv_heads, needs, walker.config.rms_norm_eps))
        finite.require(f"what block {index} gives and sums of it", statistics.sums.values(),
                       walker.dtype)
        for section, own, draw, walked, kept in zip(sections, own_needs, draws, found, chosen_for,
                                                    strict=True):
            walked.influence.append(statistics.influence())
            view = BlockView(block, statistics, widths.kv_heads, widths.intermediate,
                             section.propagation, draw, kept=kept[index] if kept else None)
            if "gradients" not in own:
                walked.scores.append(_scored(section, view, index, walker))
            if "measured" in own and block.has_attention:
                walked.agreement.append(_agreement(view, index))
        advance()
        del block, view  # the walk reads the next but one now
    if "gradients" in needs:
        inputs.append(keep(x.cpu() for x in hidden))
    return found


def _backwards(walker: BlockWalker, windows: list[torch.Tensor], sections: Sequence[ScoreSection],
               found: Sequence[Walked], advance: Callable[[], None],
               inputs: list[Batches]) -> None:
    """Add the scores of the criteria that need gradients."""
    wanted = [(section, walked) for section, walked in zip(sections, found, strict=True)
              if "gradients" in CRITERIA[section.criterion].needs]
    for index, block, gradients in blocks_backwards(walker, windows, inputs):
        widths = walker.architecture.blocks[index]
        for section, walked in wanted:
            view = BlockView(block, None, widths.kv_heads, widths.intermediate,
                             section.propagation, torch.Generator(), gradients)
            walked.scores.insert(0, _scored(section, view, index, walker))
        advance()


def _scored(section: ScoreSection, view: BlockView, index: int, walker: BlockWalker) -> Scores:
    scores = CRITERIA[section.criterion].load()(view)
    for kind, values in zip(("heads", "FFN channels", "query heads"), scores, strict=True):
        finite.require(f"the scores of block {index}'s {kind}", [values], walker.dtype)
    return scores


def _agreement(view: BlockView, index: int) -> dict[str, float]:
    """How LLM-BIP's bound on a block's heads ranks beside their measured change."""
    statistics = view.statistics
    assert statistics is not None
    bound, measured = head_bound(view), (statistics["measured"] / statistics.tokens).sqrt()
    return {"block": index, "rank_correlation": rank_correlation(bound, measured),
            "measured_above_bound": int((measured > bound).sum()),
            "mean_ratio": float((bound / measured.clamp_min(1e-30)).mean())}


def _seen(walker: BlockWalker, block: Block, hidden: Batches, statistics: Statistics) -> Statistics:
    """Run a block on all batches, in place, each device on its share; the sums over all."""
    shares = [statistics, *(altered(statistics, sums={}) for _ in walker.devices[1:])]
    blocks = [block, *map(block.on, walker.devices[1:])]
    replace(hidden, *map(partial, repeat(_see), blocks, shares))
    for share in shares[1:]:
        statistics.absorb(share)
    return statistics


def _see(block: Block, statistics: Statistics, x: torch.Tensor) -> torch.Tensor:
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
        h = gate * up
        statistics.see_ffn(gate, up, h)
        y = u + block.down(h)
    statistics.see_output(y)
    statistics.see_flow(x, u, y)
    return y


def read_scores(folder: Path) -> list[BlockScores]:
    """The scores that the stage wrote, by block; older ones are without those of query heads.
    Raises InputError where there are none."""
    blocks = _stored(folder)
    return [BlockScores(blocks[f"block.{i}.heads"], blocks[f"block.{i}.ffn"],
                        blocks.get(f"block.{i}.queries", ()))
            for i in range(_count(blocks))]


def require_scores(job: Job, scores: Sequence[BlockScores]) -> None:
    """Raise InputError where the input `score` is not of this model, or lacks query heads."""
    arch, folder = job.dense.architecture, job.inputs["score"]
    if len(scores) != len(arch.blocks) or any(
            (len(s.heads), len(s.ffn)) != (w.kv_heads, w.intermediate)
            for s, w in zip(scores, arch.blocks, strict=False)):
        raise InputError(f"the scores in {folder} are not of this model: blocks or widths differ; "
                         "score the model again")
    if job.recipe.prune.query_heads and any(
            len(s.queries) != w.heads for s, w in zip(scores, arch.blocks, strict=True)):
        raise InputError(f"prune.heads: {job.recipe.prune.heads} needs the scores of query heads, "
                         f"and those in {folder} are older; score the model again, or set "
                         "prune.heads to kv")


def read_influence(folder: Path) -> list[Influence]:
    """The influence that the stage wrote, by block. Raises InputError where there is none."""
    blocks = _stored(folder)
    if "block.0.influence" not in blocks:
        raise InputError(f"prune.depth needs the influence of every block, and the scores in "
                         f"{folder} are older than that; score the model again")
    return [Influence(*blocks[f"block.{i}.influence"]) for i in range(_count(blocks))]


def _stored(folder: Path) -> dict[str, list[float]]:
    path = folder / SCORES if folder.is_dir() else folder
    if not path.is_file():
        raise InputError(f"{folder} holds no {SCORES}; give what `bipdeploy score` wrote")
    with opened(path) as file:
        return {name: file.get_tensor(name).tolist() for name in file.keys()}


def _count(blocks: Iterable[str]) -> int:
    return len({name.split(".")[1] for name in blocks})
