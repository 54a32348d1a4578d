"""Criteria to compare with, each as its own source defines it."""

from __future__ import annotations

import torch

from bipdeploy.pruning.criteria.statistics import BlockView, Scores, of_query_heads

_EMPTY = torch.zeros(0, dtype=torch.float64)


def wanda_sp(view: BlockView) -> Scores:
    """Structured Wanda: sum_i |W[i, k]| * |X_k| on the columns of Wo and Wd.

    |X_k| is the L2 norm of input k over the calibration tokens (arXiv 2306.11695); a head's
    score is the sum over its columns.
    """
    block, stats = view.block, view.statistics
    assert stats is not None
    heads = ffn = queries = _EMPTY
    if block.has_attention:
        columns = block.output.weight.double().abs().sum(0) * stats["z_energy"].sqrt()
        heads = columns.view(view.groups, -1).sum(1).cpu()
        queries = columns.view(view.query_heads, -1).sum(1).cpu()
    if block.has_ffn:
        ffn = (block.down.weight.double().abs().sum(0) * stats["h_energy"].sqrt()).cpu()
    return Scores(heads, ffn, queries)


def magnitude(view: BlockView) -> Scores:
    """L2 norm of all weights of the coupled group; a query head has an even share of its group's K
    and V."""
    heads = ffn = queries = _EMPTY
    if view.block.has_attention:
        attention = view.block.layer.self_attn
        columns = view.block.output.weight.double().square().sum(0)
        rows = [projection.weight.double().square().sum(1)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]
        energy = columns.view(view.groups, -1).sum(1)
        for own in rows:
            energy = energy + own.view(view.groups, -1).sum(1)
        heads = energy.sqrt().cpu()
        queries = of_query_heads(columns, rows, view.groups, view.query_heads).sqrt().cpu()
    if view.block.has_ffn:
        mlp = view.block.layer.mlp
        energy = mlp.down_proj.weight.double().square().sum(0)
        for projection in (mlp.gate_proj, mlp.up_proj):
            energy = energy + projection.weight.double().square().sum(1)
        ffn = energy.sqrt().cpu()
    return Scores(heads, ffn, queries)


def random(view: BlockView) -> Scores:
    """Uniform draws: the floor that every other criterion has to beat.

    Those of query heads come from a generator of their own, so that later blocks draw what they
    would without.
    """
    heads = torch.rand(view.groups if view.block.has_attention else 0, generator=view.generator,
                       dtype=torch.float64)
    ffn = torch.rand(view.channels if view.block.has_ffn else 0, generator=view.generator,
                     dtype=torch.float64)
    if view.query_heads == view.groups:
        return Scores(heads, ffn, heads.clone())
    aside = view.generator.clone_state()
    aside.manual_seed(int(torch.randint(1 << 62, (), generator=aside)))
    return Scores(heads, ffn, torch.rand(view.query_heads, generator=aside, dtype=torch.float64))
