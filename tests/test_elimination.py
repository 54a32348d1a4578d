"""Joint selection: costs equal those of trying every group, each time with a refit of the rest."""

from __future__ import annotations

import pytest
import torch

from bipdeploy.pruning import elimination
from bipdeploy.pruning.criteria.joint import influence
from bipdeploy.pruning.criteria.llm_bip import output_gain
from bipdeploy.pruning.criteria.statistics import BlockView, Statistics
from bipdeploy.stages.score import _see
from tests.test_criteria import blocks_in_double

RIDGE = 0.01


def problem(inputs: int, outputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs [N, K] and a projection [D, K], float64."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    z = torch.randn(200, inputs, generator=generator, dtype=torch.float64) @ mixed
    return z, torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)


def refitted_error(gram: torch.Tensor, weight: torch.Tensor, kept: list[int]) -> float:
    """min |V - W|^2 in the metric of `gram`, over all V that are zero outside the kept inputs."""
    gone = [k for k in range(len(gram)) if k not in kept]
    step = torch.zeros_like(weight)
    step[:, gone] = -weight[:, gone]
    if kept:
        cross = gram[kept][:, gone] @ step[:, gone].T
        step[:, kept] = -torch.linalg.solve(gram[kept][:, kept], cross).T
    return float((step @ gram * step).sum())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_cost_is_the_least_that_any_group_adds_after_a_refit(size):
    z, weight = problem(12, 5, size)
    found = elimination.costs(z.T @ z, weight, size, ridge=RIDGE)
    gram = z.T @ z
    gram = gram + RIDGE * gram.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    left, error, highest = list(range(12 // size)), 0.0, 0.0
    while left:
        tried = {g: refitted_error(gram, weight, [k for other in left if other != g
                                                  for k in range(other * size, (other + 1) * size)])
                 for g in left}
        group = min(tried, key=lambda g: tried[g])
        highest = max(highest, tried[group] - error)
        assert float(found[group]) == pytest.approx(highest, rel=1e-6)
        error = tried[group]
        left.remove(group)


def test_what_stays_in_rounds_beats_what_single_costs_would_keep():
    z, weight = problem(96, 8, 0)
    gram = z.T @ z

    def error(kept: torch.Tensor) -> float:
        return refitted_error(gram, weight, sorted(kept.tolist()))

    alone = weight.square().sum(0) * gram.diagonal()
    for rounds in (8, 96):
        jointly = elimination.costs(gram, weight, rounds=rounds)
        assert error(jointly.topk(48).indices) < 0.8 * error(alone.topk(48).indices)


def test_twins_leave_one_at_a_time():
    """Of two channels that do the same, one can go for nothing, and then the other cannot."""
    z, weight = problem(4, 3, 1)
    z[:, 1] = z[:, 0]
    found = elimination.costs(z.T @ z, weight, ridge=1e-9)
    assert found[:2].min() < 1e-6 * found.max()
    assert found[:2].max() > 1e-3 * found.max()


def test_no_two_costs_are_equal_even_as_roots_of_shares():
    """Else which of two stays would depend on where they stand in the model."""
    z, weight = problem(96, 4, 2)
    weight[:, :20] = 0
    found = (elimination.costs(z.T @ z, weight, rounds=4) / 7e5).sqrt()
    assert len(found.unique()) == 96 and found.isfinite().all()


@torch.no_grad()
def test_scores_are_relative_errors_of_the_block_output(variant):
    """Down to its last channel and head, the costs of a block's parts are those of `costs`."""
    needs = frozenset({"outer", "ffn_parts", "output"})
    for block, x in blocks_in_double(variant):
        groups = 2
        statistics = Statistics(groups, needs, 1e-6)
        y = _see(block, statistics, x)
        view = BlockView(block, statistics, groups, 96, "bound", torch.Generator())
        heads, ffn, queries = influence(view)
        u = block.attention(x).u
        gate, up = block.ffn_parts(u)
        h = (gate * up).flatten(0, -2)
        energy = float(y.square().sum())
        expected = (elimination.costs(h.T @ h, block.down.weight) / energy).sqrt()
        torch.testing.assert_close(ffn, expected, rtol=1e-3, atol=1e-6)
        z = block.attention(x).z.flatten(0, -2)
        gain = output_gain(block, gate.flatten(0, -2).square().mean(0).sqrt().float(),
                           up.flatten(0, -2).square().mean(0).sqrt().float(),
                           (1 / (u.square().mean(-1) + 1e-6)).mean().sqrt())
        weight = block.output.weight.double() * gain[:, None]
        for found, size in ((heads, z.shape[1] // groups), (queries, 32)):
            expected = (elimination.costs(z.T @ z, weight, size) / energy).sqrt()
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
