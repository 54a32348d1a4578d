"""Choosing again at the same widths: what stays is right by trying, and the model gets better."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bipdeploy import api
from bipdeploy.model.blocks import BlockWalker
from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.model.families import BlockWidths
from bipdeploy.pruning.kept import Kept
from bipdeploy.pruning.refit import RidgeProblem
from bipdeploy.pruning.reselection import choose
from bipdeploy.pruning.slicing import slice_block
from bipdeploy.recipe.model import ModelSection
from bipdeploy.running.artifacts import read_json
from tests.sliced import architecture_of, loaded, logits, short_calibration, token_windows
from tests.test_elimination import refitted_error

TOKENS = 32


def walker(model: Path) -> BlockWalker:
    return BlockWalker(model, ModelSection(id=str(model), device="cpu"))


@torch.no_grad()
def test_one_problem_with_fewer_inputs_is_the_restricted_one():
    generator = torch.Generator().manual_seed(0)
    z, target = (torch.randn(100, n, generator=generator) for n in (12, 5))
    start = torch.randn(5, 12, generator=generator)
    whole, few = RidgeProblem(start), RidgeProblem(start[:, [1, 4, 7]])
    whole.see(z, target)
    few.see(z[:, [1, 4, 7]], target)
    found = whole.restricted(torch.tensor([1, 4, 7]))
    torch.testing.assert_close(found.solve(0.1), few.solve(0.1), rtol=1e-5, atol=1e-6)
    assert found.error(found.solve(0.1)) == pytest.approx(few.error(few.solve(0.1)), rel=1e-5)


@torch.no_grad()
def test_the_channel_that_leaves_is_the_one_that_costs_least(variant):
    """One channel short: by trying them all, behind heads that are refitted."""
    walk = walker(variant)
    own = walk.architecture.blocks[1]
    block = walk.block(1, TOKENS)
    x_dense = [torch.randn(4, TOKENS, 64, generator=torch.Generator().manual_seed(0))]
    x_own = [x_dense[0] + 0.3 * torch.randn(x_dense[0].shape,
                                            generator=torch.Generator().manual_seed(1))]
    widths = BlockWidths(own.heads, own.kv_heads, own.intermediate - 1)
    found = choose(block, own, widths, x_dense, x_own, walk.config.rms_norm_eps)
    assert found.groups == tuple(range(own.kv_heads))

    def fit(projection: torch.nn.Linear, inputs: torch.Tensor, target: torch.Tensor
            ) -> RidgeProblem:
        problem = RidgeProblem(projection.weight)
        problem.see(inputs, target - (0 if projection.bias is None else projection.bias))
        return problem

    z = block.attention(x_own[0]).z
    heads = fit(block.output, z, block.attention(x_dense[0]).u - x_own[0])
    bias = 0 if block.output.bias is None else block.output.bias
    u = x_own[0] + z @ heads.solve(0.01).float().T + bias
    gate, up = block.ffn_parts(u)
    problem = fit(block.down, gate * up, block(x_dense[0]) - u)
    gram = problem.gram_KK + 0.01 * problem.gram_KK.diagonal().mean() * torch.eye(
        own.intermediate, dtype=torch.float64)
    errors = [refitted_error(gram, problem.solve(0.01),
                             [k for k in range(own.intermediate) if k != gone])
              for gone in range(own.intermediate)]
    gone = set(range(own.intermediate)) - set(found.channels)
    assert gone == {min(range(own.intermediate), key=errors.__getitem__)}


@torch.no_grad()
def test_a_part_that_is_gone_or_whole_is_not_chosen(variant):
    walk = walker(variant)
    own, block = walk.architecture.blocks[0], walk.block(0, TOKENS)
    x = [torch.randn(2, TOKENS, 64, generator=torch.Generator().manual_seed(0))]
    eps = walk.config.rms_norm_eps
    assert choose(block, own, own, x, x, eps) == Kept(tuple(range(own.kv_heads)),
                                                      tuple(range(own.intermediate)))
    found = choose(block, own, BlockWidths(0, 0, 40), x, x, eps)
    assert found.groups == () and len(found.channels) == 40
    found = choose(block, own, BlockWidths(own.group, 1, 0), x, x, eps)
    assert len(found.groups) == 1 and found.channels == ()


@pytest.mark.parametrize("layers", ["uniform", "global"])
def test_the_repaired_model_has_the_recorded_groups_at_the_same_widths(variant, tmp_path, layers):
    settings = [*short_calibration(tmp_path), "prune.round_to=8", f"prune.layers={layers}",
                "score.criterion=random", "recover.refit.reselect=true"]
    scores = api.score(str(variant), tmp_path / "scores", settings)
    pruned = api.prune(str(variant), scores, tmp_path / "pruned", 0.4, settings)
    out = api.recover(str(variant), pruned, tmp_path / "again", settings)
    plain = api.recover(str(variant), pruned, tmp_path / "plain",
                        [s for s in settings if "reselect" not in s])
    assert architecture_of(out / "model").blocks == architecture_of(pruned / "model").blocks
    dense, made = Checkpoint(variant), Checkpoint(out / "model")
    for record in read_json(out / "recover.json")["blocks"]:
        index = record["block"]
        kept = Kept(tuple(record["groups"]), tuple(record["channels"]))
        expected = slice_block(dense.block(index), architecture_of(variant), index, kept)
        for name, tensor in made.block(index).items():
            if "o_proj.weight" not in name and "down_proj.weight" not in name:
                assert torch.equal(tensor, expected[name]), name
    windows = token_windows(8, TOKENS)
    target = logits(loaded(variant), windows)

    def distance(folder: Path) -> float:
        return float((logits(loaded(folder / "model"), windows) - target).square().mean())

    assert distance(out) < distance(plain)
