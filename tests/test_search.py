"""Searched allocation: measured curves are what they say, and the knapsack is solved."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from bipdeploy import api
from bipdeploy.data.calibration import calibration_batches
from bipdeploy.model import sources
from bipdeploy.model.blocks import BlockWalker
from bipdeploy.model.families import BlockWidths, Heads
from bipdeploy.pruning import curves as curve_costs
from bipdeploy.pruning import search
from bipdeploy.pruning.allocation import part_widths
from bipdeploy.pruning.criteria.llm_bip import rank_correlation
from bipdeploy.pruning.curves import Text
from bipdeploy.pruning.divisibility import faults
from bipdeploy.pruning.kept import BlockScores, keep
from bipdeploy.pruning.search import Curve
from bipdeploy.recipe import file
from bipdeploy.recipe.model import ModelSection
from bipdeploy.recipe.prune import PruneSection
from bipdeploy.running import artifacts
from bipdeploy.stages import score
from bipdeploy.stages.curves import searched_text
from tests.running import RECIPES
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
                        torch.rand(w.intermediate, generator=generator).tolist(),
                        torch.rand(w.heads, generator=generator).tolist())
            for w in arch.blocks]


def test_a_curve_is_linear_between_its_points_and_never_falls_with_the_width():
    curve = Curve(0, "ffn", [8, 16, 32], [0.9, 0.2, 0.0])
    assert curve.at(32) == 0
    assert curve.at(24) == pytest.approx(0.1)
    assert curve.at(12) == pytest.approx(0.55)
    noisy = Curve(0, "ffn", [8, 16, 32], [0.1, 0.2, 0.0])
    assert noisy.at(8) == 0.2


@pytest.mark.parametrize("part", ["heads", "queries", "ffn"])
def test_divergence_is_that_of_the_dense_model_with_the_groups_masked(variant, part):
    arch = architecture_of(variant)
    scores, ids = drawn_scores(arch), token_windows(2, 24)
    dense = arch.blocks[1]
    width = {"heads": Heads(1, dense.group), "queries": Heads(dense.kv_heads - 1, 1),
             "ffn": 40}[part]
    part = "ffn" if part == "ffn" else "heads"
    curves = curve_costs.measured(
        BlockWalker(variant, ModelSection(id=str(variant), device="cpu", dtype="float32")),
        Text([ids], [], None),
        scores, lambda block, p: [width] if (block, p) == (1, part) else [])
    curve = next(c for c in curves if (c.block, c.part) == (1, part))
    kept = draw_kept(arch, [(w.kv_heads, w.intermediate) for w in arch.blocks])
    best = keep(scores[1], dense.having(width))
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
        curves = curve_costs.measured(
            walker, Text([ids[:4]], [ids[4:]], refit), scores,
            lambda _, part: [Heads(1, 2), Heads(2, 2)] if part == "heads" else [48, 96])
        assert [(c.block, c.part) for c in curves] == list(product(range(3), ("heads", "ffn")))
        assert all(curve.divergences[1] == 0 for curve in curves)
        return sum(curve.divergences[0] for curve in curves)

    assert total(1e-3) < total(None)


@pytest.mark.parametrize("share", [0.45, 0.6, 0.8])
def test_the_solution_is_the_best_of_all(tiny, share):
    arch = architecture_of(tiny)
    draw = torch.Generator().manual_seed(int(share * 100))
    choices = {"heads": [Heads(1, 2), Heads(2, 2)], "ffn": [24, 48, 72, 96]}
    curves = [Curve(block, part, widths, sorted(torch.rand(len(widths), generator=draw).tolist(),
                                                reverse=True))
              for block in range(3) for part, widths in choices.items()]
    total = sum(map(arch.block_parameters, range(3)))
    found = search.solve(arch, curves, lambda _, part: choices[part], total * share)
    used = sum(arch.block_parameters(i, w) for i, w in enumerate(found))
    assert used <= total * share * (1 + 6 / search.GRID)
    options = [BlockWidths(0, 0, f).having(heads) for heads, f in product(*choices.values())]
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
    assert widths(1, "heads") == [(2, 2)]
    assert widths(0, "ffn") == [96]
    assert widths(1, "ffn") == list(range(8, 97, 8))
    assert part_widths(arch, section, tensor_parallel=2)(2, "ffn") == list(range(8, 97, 8))


def test_the_fisher_form_is_the_divergence_of_small_errors(variant):
    """Of one block's outputs: the smaller they are, the nearer are the two."""
    walker = BlockWalker(variant, ModelSection(id=str(variant), device="cpu", dtype="float32"))
    text = Text([token_windows(8, 32)], [], None)
    index, block, _, sensings = next(found for found in curve_costs.backwards(
        walker, text, seed=0, draws=256) if found[0] == 1)
    gradients = sensings["ffn"][0][1]
    hidden = block(walker.block(0, 32)(walker.embed(text.judged)[0]))
    later, head = [walker.block(i, 32) for i in range(index + 1, len(walker))], walker.head()
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))

    def output(y: torch.Tensor) -> torch.Tensor:
        for follows in later:
            y = follows(y)
        return head(y).double().log_softmax(-1)

    apart = []
    for size in (0.4, 0.1):
        error = size * hidden.std() * direction
        with torch.no_grad():
            exact = curve_costs.divergence(output(hidden + error), output(hidden))
        estimated = sum(curve_costs.fisher(g, error) for g in gradients) / len(gradients)
        apart.append(abs(estimated / exact - 1))
    assert apart[1] < 0.1
    assert apart[1] < apart[0]


def test_what_is_sensed_ranks_as_what_is_measured():
    """On the built-in model, all widths of all parts together."""
    recipe = file.load(RECIPES / "quickstart.yaml", ["calibration.samples=48",
                                                     "prune.search.windows=16"])
    walker = BlockWalker(sources.dense_folder(recipe.model), recipe.model)
    drawn, _ = calibration_batches(recipe, walker.checkpoint.folder, 256)
    text = searched_text(recipe, torch.cat(drawn))
    scores = [BlockScores(own.heads.tolist(), own.ffn.tolist())
              for own in score.score_blocks(walker, drawn, recipe).scores]
    choices = part_widths(walker.architecture, recipe.prune)

    def widths(block: int, part: str) -> list[int]:
        return search.spaced(choices(block, part), 4)

    found = curve_costs.sensed(walker, text, scores, widths, seed=0)
    expected = curve_costs.measured(walker, text, scores, widths)
    assert [(c.block, c.part, c.widths) for c in found] == [
        (c.block, c.part, c.widths) for c in expected]
    assert [[d == 0 for d in c.divergences] for c in found] == [
        [d == 0 for d in c.divergences] for c in expected]
    assert rank_correlation(*(torch.tensor([d for c in curves for d in c.divergences if d])
                              for curves in (found, expected))) > 0.97


def test_refits_are_judged_by_windows_that_they_have_not_seen(tiny):
    """Five tokens per input: a refit fits them all, which says nothing of others."""
    arch = architecture_of(tiny)
    scores, ids = drawn_scores(arch), token_windows(9, 8)
    walker = BlockWalker(tiny, ModelSection(id=str(tiny), device="cpu"))

    def total(judged: torch.Tensor) -> float:
        return sum(curve.divergences[0] for curve in curve_costs.measured(
            walker, Text([judged], [ids[:1]], 1e-6), scores,
            lambda _, part: [Heads(2, 2)] if part == "heads" else [48]))

    assert total(ids[1:]) > 2 * total(ids[:1])


def test_windows_are_shared_out_between_refits_and_judgement(tiny):
    def shared(*settings: str) -> tuple[int, int]:
        recipe = file.build({"name": "shared", "model": {"id": str(tiny)}, "prune": {"ratio": 0.3}},
                            "here", ["calibration.batch=2", *settings])
        text = searched_text(recipe, torch.arange(40).view(10, 4))
        seen = torch.cat([*text.fitted, *text.judged])
        assert seen.tolist() == torch.arange(40).view(10, 4)[-len(seen):].tolist()
        return sum(map(len, text.fitted)), sum(map(len, text.judged))

    assert shared("prune.search.windows=3") == (7, 3)
    assert shared("prune.search.windows=32") == (5, 5)
    assert shared("prune.search.windows=3", "recover.method=none") == (0, 3)


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


def test_rounds_narrow_what_earlier_ones_left(tiny, tmp_path):
    """Each slices the dense model to less than the one before, and the last meets the budget."""
    settings = [*short_calibration(tmp_path), "prune.layers=searched", "prune.round_to=8",
                "prune.search.points=3"]
    scores = api.score(str(tiny), tmp_path / "scores", settings)

    def kept(ratio: float, rounds: int) -> tuple[dict, float]:
        folder = api.prune(str(tiny), scores, tmp_path / f"{ratio}-{rounds}", ratio,
                           [*settings, f"prune.search.rounds={rounds}"])
        assert not (folder / "rounds").exists()
        return (artifacts.read_json(folder / "kept.json"),
                artifacts.figures([folder])["block_parameters.ratio"])

    half, _ = kept(0.2, 1)
    (whole, reached), (at_once, _) = kept(0.4, 2), kept(0.4, 1)
    assert reached == pytest.approx(0.6, abs=0.03)
    assert len(whole["search"]["divergence_by_round"]) == 2
    assert whole["search"]["curves"] == at_once["search"]["curves"]
    for before, after in zip(half["blocks"], whole["blocks"], strict=True):
        for groups in ("kept_groups", "kept_channels"):
            assert set(after[groups]) <= set(before[groups])
    assert whole["blocks"] != half["blocks"]
    sliced, dense = (loaded(folder).state_dict() for folder in (
        tmp_path / "0.4-2" / "model", tiny))
    for index, block in enumerate(whole["blocks"]):
        name = f"model.layers.{index}.mlp.down_proj.weight"
        assert torch.equal(sliced[name], dense[name][:, block["kept_channels"]])


def test_the_ridge_of_a_search_is_chosen_on_windows_held_back(tiny):
    """From five tokens per input, noise is fitted unless the ridge is high."""
    arch = architecture_of(tiny)
    scores, ids = drawn_scores(arch), token_windows(9, 8)
    walker = BlockWalker(tiny, ModelSection(id=str(tiny), device="cpu"))

    def total(ridge: float | str, held: int) -> float:
        return sum(curve.divergences[0] for curve in curve_costs.measured(
            walker, Text([ids[4:]], [ids[:2], ids[2:4]], ridge, held), scores,
            lambda _, part: [Heads(2, 2)] if part == "heads" else [48]))

    assert total("auto", 1) < total(1e-6, 0)
