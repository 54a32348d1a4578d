"""Searched allocation: measured curves are what they say, and the knapsack is solved."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from bipdeploy import api
from bipdeploy.model.blocks import BlockWalker
from bipdeploy.model.families import BlockWidths
from bipdeploy.pruning import search
from bipdeploy.pruning.allocation import BlockScores, keep, part_widths
from bipdeploy.pruning.divisibility import faults
from bipdeploy.pruning.search import Curve
from bipdeploy.recipe.model import ModelSection
from bipdeploy.recipe.prune import PruneSection
from bipdeploy.running import artifacts
from tests.sliced import (
    architecture_of,
    draw_kept,
    loaded,
    logits,
    masked_model,
    short_calibration,
    token_windows,
)


def drawn_scores(arch, seed: int = 0) -> list[BlockScores]:
    generator = torch.Generator().manual_seed(seed)
    return [BlockScores(torch.rand(w.kv_heads, generator=generator).tolist(),
                        torch.rand(w.intermediate, generator=generator).tolist())
            for w in arch.blocks]


def test_a_curve_is_linear_between_its_points_and_never_falls_with_the_width():
    curve = Curve(0, "ffn", [8, 16, 32], [0.9, 0.2, 0.0])
    assert curve.at(32) == 0
    assert curve.at(24) == pytest.approx(0.1)
    assert curve.at(12) == pytest.approx(0.55)
    noisy = Curve(0, "ffn", [8, 16, 32], [0.1, 0.2, 0.0])
    assert noisy.at(8) == 0.2


@pytest.mark.parametrize("part", ["heads", "ffn"])
def test_divergence_is_that_of_the_dense_model_with_the_groups_masked(variant, part):
    arch = architecture_of(variant)
    scores, ids = drawn_scores(arch), token_windows(2, 24)
    width = 1 if part == "heads" else 40
    curves = search.measure(
        BlockWalker(variant, ModelSection(id=str(variant), device="cpu", dtype="float32")), [ids],
        scores, lambda block, p: [width] if (block, p) == (1, part) else [], refit=None)
    curve = next(c for c in curves if (c.block, c.part) == (1, part))
    kept = draw_kept(arch, [(w.kv_heads, w.intermediate) for w in arch.blocks])
    best = keep(scores[1], BlockWidths(0, width, arch.blocks[1].intermediate)
                if part == "heads" else BlockWidths(0, arch.blocks[1].kv_heads, width))
    masked = logits(masked_model(variant, [kept[0], best, *kept[2:]]), ids).log_softmax(-1)
    expected = logits(loaded(variant), ids).log_softmax(-1)
    by_hand = float((expected.exp() * (expected - masked)).sum(-1).mean())
    assert by_hand > 1e-3
    assert curve.divergences == [pytest.approx(by_hand, rel=1e-3)]


def test_the_dense_width_costs_nothing_and_a_refit_costs_less_than_none(tiny):
    arch = architecture_of(tiny)
    scores, ids = drawn_scores(arch), token_windows(16, 64)
    walker = BlockWalker(tiny, ModelSection(id=str(tiny), device="cpu"))

    def total(refit: float | None) -> float:
        curves = search.measure(walker, [ids], scores, lambda _, part: (
            [1, 2] if part == "heads" else [48, 96]), refit=refit)
        assert all(curve.divergences[1] < 1e-6 for curve in curves)
        return sum(curve.divergences[0] for curve in curves)

    assert total(1e-3) < total(None)


@pytest.mark.parametrize("share", [0.45, 0.6, 0.8])
def test_the_solution_is_the_best_of_all(tiny, share):
    arch = architecture_of(tiny)
    draw = torch.Generator().manual_seed(int(share * 100))
    choices = {"heads": [1, 2], "ffn": [24, 48, 72, 96]}
    curves = [Curve(block, part, widths, sorted(torch.rand(len(widths), generator=draw).tolist(),
                                                reverse=True))
              for block in range(3) for part, widths in choices.items()]
    total = sum(map(arch.block_parameters, range(3)))
    found = search.solve(arch, curves, lambda _, part: choices[part], total * share)
    used = sum(arch.block_parameters(i, w) for i, w in enumerate(found))
    assert used <= total * share * (1 + 6 / search.GRID)
    options = [BlockWidths(k * 2, k, f) for k, f in product(*choices.values())]
    best = min(search.predicted(curves, widths) for widths in product(options, repeat=3)
               if sum(arch.block_parameters(i, w) for i, w in enumerate(widths)) <= total * share)
    assert search.predicted(curves, found) <= best + 1e-9


def test_a_budget_below_the_smallest_widths_is_an_error(tiny):
    arch = architecture_of(tiny)
    curves = [Curve(i, "ffn", [48, 96], [1.0, 0.0]) for i in range(3)]
    with pytest.raises(ValueError, match="below what the smallest"):
        search.solve(arch, curves, lambda *_: [48, 96],
                     0.3 * sum(map(arch.block_parameters, range(3))))


def test_widths_of_parts_that_are_not_pruned_stay_dense(tiny):
    arch = architecture_of(tiny)
    section = PruneSection.model_validate({"ratio": 0.2, "round_to": 8, "heads": False,
                                           "protect": {"first": 1}})
    widths = part_widths(arch, section)
    assert widths(1, "heads") == [2]
    assert widths(0, "ffn") == [96]
    assert widths(1, "ffn") == list(range(8, 97, 8))
    assert part_widths(arch, section, tensor_parallel=2)(2, "ffn") == list(range(8, 97, 8))


@pytest.mark.parametrize("parallel", [1, 2])
def test_pruning_by_search_meets_its_budget_and_divides(tiny, tmp_path, parallel):
    settings = [*short_calibration(tmp_path), "prune.layers=searched", "prune.round_to=8",
                "prune.search.points=3", f"hardware.tensor_parallel={parallel}"]
    scores = api.score(str(tiny), tmp_path / "scores", settings)
    pruned = api.prune(str(tiny), scores, tmp_path / "pruned", 0.35, settings)
    arch = architecture_of(pruned / "model")
    kept = artifacts.figures([pruned])["block_parameters.ratio"]
    assert kept == pytest.approx(0.65, abs=8 * arch.channel_parameters() / sum(
        map(architecture_of(tiny).block_parameters, range(3))))
    assert faults(arch.blocks, parallel) == []
    found = artifacts.read_json(pruned / "kept.json")["search"]
    assert 0 < found["divergence"] <= found["divergence_uniform"] * 1.05
    assert len(found["curves"]) == 6
