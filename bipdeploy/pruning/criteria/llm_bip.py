"""LLM-BIP: a group's influence on the output of its transformer block (arXiv 2412.06419).

Restated from the paper's abstract and derived here; nothing in this file claims to reproduce
the paper's own equations. With u = x + A(N1(x)) and y = u + F(N2(u)), the influence of group s

    I(s) = sqrt( mean_t |dy_t(s)|^2 / mean_t |y_t|^2 )

is dimensionless, so groups of different blocks can be compared. For an FFN channel it is exact.
For a KV group with its query heads, the change delta = -Wo[:, s] z[s] of u has to be carried
through the FFN: by a first-order Lipschitz bound (`bound`) or by running it (`measured`).
"""

from __future__ import annotations

import torch

from bipdeploy.model.blocks import Block
from bipdeploy.pruning import elimination
from bipdeploy.pruning.criteria.statistics import SILU_LIPSCHITZ, BlockView, Scores, pieces, squares


def influence(view: BlockView) -> Scores:
    """Influence of every group: heads [G], ffn [F], queries [G*q].

    Query heads that share a KV head are ranked by the bound under either propagation: to measure
    them all would take a pass through the FFN for each.
    """
    block, stats = view.block, view.statistics
    assert stats is not None
    output_energy = stats["output_energy"].clamp_min(1e-30)
    empty = torch.zeros(0, dtype=torch.float64)
    heads, ffn, queries = empty, empty, empty
    if block.has_ffn:
        ffn = (channel_energy(block.down.weight, stats["h_energy"]) / output_energy).sqrt()
    if block.has_attention:
        if view.propagation == "measured":
            heads = (stats["measured"] / output_energy).sqrt()
        else:
            heads = head_bound(view) * (stats.tokens / output_energy).sqrt()
        queries = heads if view.query_heads == view.groups else (
            head_bound(view, view.query_heads) * (stats.tokens / output_energy).sqrt())
    return Scores(*(own.double().cpu() for own in (heads, ffn, queries)))


def channel_energy(down_DF: torch.Tensor, h_energy_F: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of |dy|^2 when channel k leaves, exactly: |Wd[:, k]|^2 * sum_t h[t, k]^2."""
    return squares(down_DF) * h_energy_F


def head_bound(view: BlockView, heads: int | None = None) -> torch.Tensor:
    """First-order bound on rms_t |dy_t| for the removal of each group: [G]; with the number of
    query heads as `heads`, for that of each of them: [G*q].

    |dy| <= |delta| + sum_j a_j |gamma_j| |delta_j| / rms(u), by Minkowski's inequality taken over
    tokens coordinate by coordinate, so that only Gram matrices of z are needed. `a` bounds how far
    a unit change of FFN input j moves the FFN's output, with activations at their rms over the
    calibration tokens. It leaves out the radial part of RMSNorm's Jacobian and second-order
    terms: an estimate from above for ranking; `strict_bound` is the inequality without gaps.
    """
    stats, block = view.statistics, view.block
    assert stats is not None
    w_GDC = view.grouped_output(heads or view.groups)
    size = w_GDC.shape[-1]

    def rms_of_delta(gram: torch.Tensor) -> torch.Tensor:  # [G, D]
        if gram.shape[-1] > size:  # of a query head, its part of the group's
            gram = torch.cat([elimination.diagonal_blocks(own, size) for own in gram])
        return ((w_GDC @ gram) * w_GDC).sum(-1).clamp_min(0).div(stats.tokens).sqrt()

    residual = rms_of_delta(stats["z_gram"]).square().sum(-1).sqrt()
    if not block.has_ffn:
        return residual
    gain = ffn_input_gain(block, (stats["gate_energy"] / stats.tokens).sqrt().float(),
                          (stats["up_energy"] / stats.tokens).sqrt().float())
    gamma = block.layer.post_attention_layernorm.weight.float().abs()
    return residual + rms_of_delta(stats["z_gram_scaled"]) @ (gain * gamma)


def ffn_input_gain(block: Block, gate_F: torch.Tensor, up_F: torch.Tensor) -> torch.Tensor:
    """a_j = sum_k |Wd[:, k]| (L |up_k| |Wg[k, j]| + |silu(gate_k)| |Wu[k, j]|): [D].

    `gate_F` and `up_F` are magnitudes of silu(gate) and up; L bounds the slope of silu.
    """
    mlp = block.layer.mlp
    reach_F = squares(mlp.down_proj.weight).sqrt().float()
    return (_through(reach_F * up_F * SILU_LIPSCHITZ, mlp.gate_proj.weight)
            + _through(reach_F * gate_F, mlp.up_proj.weight))


def _through(size_F: torch.Tensor, weight_FD: torch.Tensor) -> torch.Tensor:
    """size @ |weight|: [D]."""
    parts = pieces(weight_FD)
    sizes = size_F.split([len(part) for part in parts])
    return torch.stack([size @ part.float().abs()
                        for size, part in zip(sizes, parts, strict=True)]).sum(0)


def output_gain(block: Block, gate_F: torch.Tensor, up_F: torch.Tensor, inverse: torch.Tensor
                ) -> torch.Tensor:
    """How far a unit change of each coordinate of the attention's output moves the block's: [D].

    c_j of |dy| <= sum_j c_j |delta_j|; `gate_F`, `up_F` as in `ffn_input_gain`, `inverse` the
    magnitude of 1 / rms(u). Float64.
    """
    gamma = block.layer.post_attention_layernorm.weight.float().abs()
    return 1 + (ffn_input_gain(block, gate_F, up_F) * gamma * inverse).double()


def strict_bound(block: Block, delta: torch.Tensor, u: torch.Tensor,
                 eps: float) -> torch.Tensor:
    """An upper bound on |dy_t| for every token: delta, u [N, D] → [N]. Holds without exception.

    Uses |û - v̂| <= 2|u - v| / (|u| + |v|) for normalised vectors (with eps as one more
    coordinate of both), and keeps silu's second-order term:
    |dh_k| <= |silu(g_k)||dv_k| + L|v_k||dg_k| + L|dg_k||dv_k|.
    """
    mlp = block.layer.mlp
    gamma = block.layer.post_attention_layernorm.weight
    gate, up = block.ffn_parts(u)
    size = delta.norm(dim=-1)
    rms = (u.square().mean(-1) + eps).sqrt() + ((u + delta).square().mean(-1) + eps).sqrt()
    step = 2 * size / rms  # how far the normalised input moves
    reach = mlp.down_proj.weight.norm(dim=0)
    d_gate = step[:, None] * (mlp.gate_proj.weight * gamma).norm(dim=1)
    d_up = step[:, None] * (mlp.up_proj.weight * gamma).norm(dim=1)
    d_h = (gate.abs() * d_up + SILU_LIPSCHITZ * up.abs() * d_gate
           + SILU_LIPSCHITZ * d_gate * d_up)
    return size + d_h @ reach


def measured_change(block: Block, z: torch.Tensor, u: torch.Tensor, groups: int) -> torch.Tensor:
    """Sum over a batch's tokens of |dy|^2 for the removal of each group: [G]. Exact.

    z: o_proj's inputs [B, T, G*q*E]; u: attention outputs [B, T, D]. One FFN pass per group.
    """
    width = z.shape[-1] // groups
    before = block.ffn(u) if block.has_ffn else torch.zeros_like(u)
    energies = []
    for group in range(groups):
        part = slice(group * width, (group + 1) * width)
        delta = -(z[..., part] @ block.output.weight[:, part].T)
        after = block.ffn(u + delta) if block.has_ffn else before
        energies.append((delta + after - before).float().square().sum())
    return torch.stack(energies)


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's rank correlation of two score vectors; nan where one is constant or too short."""
    if len(a) < 2:
        return float("nan")
    ranks = torch.stack([v.argsort().argsort().double() for v in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])
