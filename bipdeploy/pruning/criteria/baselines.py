"""Criteria to compare with, each as its own source defines it."""

from __future__ import annotations

import torch

from bipdeploy.pruning.criteria.statistics import BlockView, Scores

_EMPTY = torch.zeros(0, dtype=torch.float64)


def wanda_sp(view: BlockView) -> Scores:
    """Structured Wanda: sum_i |W[i, k]| * |X_k| on the columns of Wo and Wd.

    |X_k| is the L2 norm of input k over the calibration tokens (arXiv 2306.11695); a head's
    score is the sum over its columns.
    """
    block, stats = view.block, view.statistics
    assert stats is not None
    heads = ffn = _EMPTY
    if block.has_attention:
        columns = block.output.weight.double().abs().sum(0) * stats["z_energy"].sqrt()
        heads = columns.view(view.groups, -1).sum(1).cpu()
    if block.has_ffn:
        ffn = (block.down.weight.double().abs().sum(0) * stats["h_energy"].sqrt()).cpu()
    return Scores(heads, ffn)


def magnitude(view: BlockView) -> Scores:
    """L2 norm of all weights of the coupled group."""
    heads = ffn = _EMPTY
    if view.block.has_attention:
        attention = view.block.layer.self_attn
        energy = view.block.output.weight.double().square().sum(0).view(view.groups, -1).sum(1)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            energy = energy + projection.weight.double().square().sum(1).view(
                view.groups, -1).sum(1)
        heads = energy.sqrt().cpu()
    if view.block.has_ffn:
        mlp = view.block.layer.mlp
        energy = mlp.down_proj.weight.double().square().sum(0)
        for projection in (mlp.gate_proj, mlp.up_proj):
            energy = energy + projection.weight.double().square().sum(1)
        ffn = energy.sqrt().cpu()
    return Scores(heads, ffn)


def random(view: BlockView) -> Scores:
    """Uniform draws: the floor that every other criterion has to beat."""
    heads = torch.rand(view.groups if view.block.has_attention else 0, generator=view.generator,
                       dtype=torch.float64)
    ffn = torch.rand(view.channels if view.block.has_ffn else 0, generator=view.generator,
                     dtype=torch.float64)
    return Scores(heads, ffn)
