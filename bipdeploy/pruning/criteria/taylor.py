"""LLM-Pruner: the first-order change of the loss when a group's weights go (arXiv 2305.11627).

The gradient is that of the mean next-token cross-entropy on the calibration windows. A coupled
group's importance is the sum over its parts, LLM-Pruner's default. Scores of all blocks are
estimates of the same loss, so they are comparable. Following the code (horseee/LLM-Pruner,
`hf_llama_pruner.py`, `--taylor param_first` and `vectorize`); its recipes keep the first and
last blocks dense, which is `prune.protect` here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bipdeploy.pruning.criteria.statistics import BlockView, Scores, of_query_heads

# Salience W * dL/dW and the dimension to sum over → importance of the rows or columns.
Reduction = Callable[[torch.Tensor, int], torch.Tensor]


def elements(view: BlockView) -> Scores:
    """sum |W * dL/dW| over all weights of the group: element by element, as for its LLaMAs."""
    return _scores(view, lambda salience, dim: salience.abs().sum(dim, dtype=torch.float64))


def vectors(view: BlockView) -> Scores:
    """sum over the group's rows and columns of |sum of W * dL/dW|: one estimate per vector."""
    return _scores(view, lambda salience, dim: salience.sum(dim, dtype=torch.float64).abs())


def _scores(view: BlockView, reduction: Reduction) -> Scores:
    def importance(part: str, dim: int) -> torch.Tensor:
        weight = view.block.layer.get_parameter(f"{part}.weight").detach().float()
        return reduction(weight * view.gradients[f"{part}.weight"], dim)

    heads = ffn = queries = torch.zeros(0, dtype=torch.float64)
    if view.block.has_attention:
        rows = [importance(f"self_attn.{p}_proj", 1) for p in "qkv"]
        columns = importance("self_attn.o_proj", 0)
        heads = torch.stack([v.view(view.groups, -1).sum(1) for v in (*rows, columns)]).sum(0).cpu()
        queries = of_query_heads(columns, rows, view.groups, view.query_heads).cpu()
    if view.block.has_ffn:
        ffn = (importance("mlp.gate_proj", 1) + importance("mlp.up_proj", 1)
               + importance("mlp.down_proj", 0)).cpu()
    return Scores(heads, ffn, queries)
