"""Choosing again which groups of a block stay, on the pruned model's own input.

Scores are taken from the dense model. By the time the pruned model is repaired block by block, it
is known what input each block will really get and what its output should be; the same widths can
then be filled better: jointly with the refit, by `elimination`. Shapes as in `refit.py`.
"""

from __future__ import annotations

import torch

from bipdeploy.model.activations import Batches
from bipdeploy.model.blocks import Block
from bipdeploy.model.families import BlockWidths
from bipdeploy.pruning import elimination
from bipdeploy.pruning.criteria.llm_bip import output_gain
from bipdeploy.pruning.criteria.statistics import inverse_rms
from bipdeploy.pruning.kept import BlockScores, Kept, keep
from bipdeploy.pruning.refit import RidgeProblem
from bipdeploy.pruning.slicing import expand


def choose(dense: Block, own: BlockWidths, widths: BlockWidths, x_dense: Batches,
           x_pruned: Batches, eps: float) -> Kept:
    """The groups, query heads and channels of a dense block that stay at `widths`; `own` are its
    own.

    x_*: the block's inputs in the dense and the pruned model, batches of [B, T, D]; eps: of
    RMSNorm. Heads first, towards the dense attention output, each coordinate weighted by how far
    it moves the block's output; then channels, towards the dense block's output, with the kept
    heads refitted.
    """
    keeps_groups = own.kv_heads == widths.kv_heads or not widths.kv_heads
    keeps_queries = own.group == widths.group or not widths.kv_heads
    keeps_ffn = own.intermediate == widths.intermediate or not widths.intermediate
    # Where all or none stay there is nothing to choose.
    heads, queries = [0.0] * own.kv_heads, [0.0] * own.heads
    output, columns = None, torch.arange(0)
    if widths.kv_heads:
        problem, gain = _attention(dense, x_dense, x_pruned, eps)
        size = len(problem.gram_KK) // own.heads
        if not (keeps_groups and keeps_queries):
            fitted = problem.solve(elimination.RIDGE) * gain[:, None]
            if not keeps_groups:
                heads = elimination.costs(problem.gram_KK, fitted, size * own.group).tolist()
            if not keeps_queries:
                queries = elimination.costs(problem.gram_KK, fitted, size).tolist()
        kept = keep(BlockScores(heads, [], queries), widths.having(0))
        columns = expand(kept.query_heads(own.group), size).to(problem.gram_KK.device)
        output = problem.restricted(columns).solve(elimination.RIDGE)
        del problem
    channels = [0.0] * own.intermediate
    if not keeps_ffn:
        problem = _ffn(dense, x_dense, x_pruned, output, columns)
        channels = elimination.costs(problem.gram_KK, problem.solve(elimination.RIDGE)).tolist()
    return keep(BlockScores(heads, channels, queries), widths)


def _attention(dense: Block, x_dense: Batches, x_pruned: Batches, eps: float
               ) -> tuple[RidgeProblem, torch.Tensor]:
    """The refit of o_proj with all heads there, and the gain of its output coordinates [D]."""
    problem = RidgeProblem(dense.output.weight)
    gate_energy = up_energy = inverse_energy = torch.zeros(1)
    tokens = 0
    for x, x_own in zip(x_dense, x_pruned, strict=True):
        attended = dense.attention(x_own)
        problem.see(attended.z, _less_bias(dense.attention(x).u - x_own, dense.output))
        if dense.has_ffn:
            gate, up = (part.flatten(0, -2).float() for part in dense.ffn_parts(attended.u))
            gate_energy = gate_energy.to(gate) + gate.square().sum(0)
            up_energy = up_energy.to(up) + up.square().sum(0)
            inverse = inverse_rms(attended.u, eps)
            inverse_energy = inverse_energy.to(inverse) + inverse.square().sum()
            tokens += len(inverse)
    if not dense.has_ffn:
        return problem, problem.start_DK.new_ones(len(problem.start_DK), dtype=torch.float64)
    return problem, output_gain(dense, *((energy / tokens).sqrt() for energy in (
        gate_energy, up_energy, inverse_energy)))


def _ffn(dense: Block, x_dense: Batches, x_pruned: Batches, output: torch.Tensor | None,
         columns: torch.Tensor) -> RidgeProblem:
    """The refit of down_proj with all channels there, behind the attention with `output`."""
    problem = RidgeProblem(dense.down.weight)
    for x, x_own in zip(x_dense, x_pruned, strict=True):
        u = x_own
        if output is not None:
            bias = 0.0 if dense.output.bias is None else dense.output.bias
            u = x_own + dense.attention(x_own).z[..., columns] @ output.to(x_own.dtype).T + bias
        gate, up = dense.ffn_parts(u)
        problem.see(gate * up, _less_bias(dense(x) - u, dense.down))
    return problem


def _less_bias(target: torch.Tensor, projection: torch.nn.Linear) -> torch.Tensor:
    return target if projection.bias is None else target - projection.bias
