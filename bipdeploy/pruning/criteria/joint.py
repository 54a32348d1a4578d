"""LLM-BIP with joint selection: what a group costs once the others have taken over its part.

An extension of this project, not of the paper. The error of an FFN channel's removal is exact at
the block's output, as in `llm_bip`; that of a head is weighted by LLM-BIP's bound on how far each
coordinate of the attention's output moves the block's output.
"""

from __future__ import annotations

import torch

from bipdeploy.pruning import elimination
from bipdeploy.pruning.criteria.llm_bip import output_gain
from bipdeploy.pruning.criteria.statistics import BlockView, Scores


def influence(view: BlockView) -> Scores:
    """Relative error of the block's output that each group's removal adds: heads [G], ffn [F];
    and that of each query head's, where they leave one by one: queries [G*q].

    In the order of removal, see `elimination.costs`: that of a group which leaves late is what it
    costs when those before it are gone.
    """
    block, stats = view.block, view.statistics
    assert stats is not None
    output_energy = float(stats["output_energy"].clamp_min(1e-30))
    heads = ffn = queries = torch.zeros(0, dtype=torch.float64)
    if block.has_attention:
        weight = block.output.weight.double()
        if block.has_ffn:
            weight = weight * output_gain(block, *(
                (stats[name] / stats.tokens).sqrt().float()
                for name in ("gate_energy", "up_energy", "inverse_energy")))[:, None]
        heads = elimination.costs(stats["z_outer"], weight, weight.shape[1] // view.groups)
        queries = heads if view.query_heads == view.groups else elimination.costs(
            stats["z_outer"], weight, weight.shape[1] // view.query_heads)
    if block.has_ffn:
        ffn = elimination.costs(stats["h_outer"], block.down.weight)
    return Scores(*((own / output_energy).sqrt() for own in (heads, ffn, queries)))
