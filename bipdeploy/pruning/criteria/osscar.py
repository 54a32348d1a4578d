"""OSSCAR (arXiv 2403.12983): the groups whose removal changes a projection's output least, by
second-order removal in stages and a local search, for the number of groups that is to stay.

As published: both output projections by themselves, each towards its dense output with 0.01 of the
mean energy of its inputs as damping; ten channels or two heads leave at a stage, as in the authors'
code, with the weights that stay refitted after each; then groups that stay are exchanged for groups
that left. Different here: an exchange is of one group for one, and the best of all pairs by its
exact effect (theirs exchanges the cheapest several for the most wanted several, and keeps what that
lowered); all projections are seen in the dense model, and the weights that this finds are left to
the repair, which refits block by block on the pruned model's input.
"""

from __future__ import annotations

import torch

from bipdeploy.pruning import elimination, swaps
from bipdeploy.pruning.criteria.statistics import BlockView, Scores

CHANNELS, HEADS = 10, 2  # that leave at a stage


def chosen(view: BlockView) -> Scores:
    """Squared error of the projection's output that each group's removal adds, in the order they
    leave; twice the highest more for the groups that stay at the view's widths: heads [G],
    ffn [F]. Of query heads [G*q] the order of removal alone."""
    block, stats, kept = view.block, view.statistics, view.kept
    assert stats is not None
    heads = ffn = queries = torch.zeros(0, dtype=torch.float64)
    if block.has_attention:
        gram, weight = stats["z_outer"], block.output.weight
        heads = _scored(gram, weight, view.groups, HEADS, kept.kv_heads if kept else None)
        queries = _scored(gram, weight, view.query_heads, HEADS, None)
    if block.has_ffn:
        ffn = _scored(stats["h_outer"], block.down.weight, view.channels, CHANNELS,
                      kept.intermediate if kept else None)
    return Scores(heads, ffn, queries)


def _scored(gram_KK: torch.Tensor, weight_DK: torch.Tensor, count: int, stage: int,
            stay: int | None) -> torch.Tensor:
    """Scores of `count` groups, of which `stay` are to stay; None: as many as may be."""
    size = len(gram_KK) // count
    costs = elimination.costs(gram_KK, weight_DK, size, rounds=-(-count // stage))
    if not stay or stay == count:
        return costs
    stays = torch.zeros(count, dtype=torch.bool)
    stays[costs.topk(stay).indices] = True
    return costs + 2 * costs.max() * swaps.improved(gram_KK, weight_DK, stays, size)
