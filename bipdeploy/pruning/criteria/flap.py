"""FLAP: what fluctuates least is best replaced by its mean (arXiv 2312.11983).

Each input k of o_proj and down_proj gets a metric, standardised within its projection; a head's
score is the mean over its columns. FLAP's code (CASIA-IVA-Lab/FLAP, `lib/prune.py`) squares the
metric of o_proj first, and so is it done here. With `prune.layers: adaptive` heads and channels
of all blocks stand in one ranking, as in its structure AL-AM; `global` keeps heads and channels
apart, as in AL-MM. Here a block always keeps a KV head and one rounding unit of channels, which
leave by whole units; there it may lose a whole part. Its repair is `recover.method: bias`.

X: calibration inputs of a projection, W: its weight. Variances are taken over all tokens; FLAP's
code updates them window by window with other weights, and leaves the first window out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bipdeploy.pruning.criteria.statistics import BlockView, Scores, Statistics

# (weight [D, K], statistics, their prefix) → metric of the projection's inputs [K].
Metric = Callable[[torch.Tensor, Statistics, str], torch.Tensor]


def wifv(view: BlockView) -> Scores:
    """Weighted input feature variance: var(X_k) * |W[:, k]|^2. FLAP's default."""
    return _scores(view, lambda weight, statistics, prefix:
                   statistics.variance(prefix) * weight.square().sum(0))


def ifv(view: BlockView) -> Scores:
    """Input feature variance: var(X_k)."""
    return _scores(view, lambda _, statistics, prefix: statistics.variance(prefix))


def wifn(view: BlockView) -> Scores:
    """Weighted input feature norm: mean_i |W[i, k]| * |X_k|."""
    return _scores(view, lambda weight, statistics, prefix:
                   weight.abs().mean(0) * statistics[f"{prefix}_energy"].sqrt())


def _scores(view: BlockView, metric: Metric) -> Scores:
    block, statistics = view.block, view.statistics
    assert statistics is not None
    heads = ffn = queries = torch.zeros(0, dtype=torch.float64)
    if block.has_attention:
        columns = standardised(metric(block.output.weight.double(), statistics, "z").square())
        heads = columns.view(view.groups, -1).mean(1).cpu()
        queries = columns.view(view.query_heads, -1).mean(1).cpu()
    if block.has_ffn:
        ffn = standardised(metric(block.down.weight.double(), statistics, "h")).cpu()
    return Scores(heads, ffn, queries)


def standardised(values: torch.Tensor) -> torch.Tensor:
    """Zero mean, unit variance; all zero where the values do not differ."""
    centred = values - values.mean()
    spread = values.std() if len(values) > 1 else values.new_zeros(())
    return torch.zeros_like(values) if spread == 0 else centred / spread
