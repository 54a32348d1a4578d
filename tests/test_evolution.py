"""Evolved widths: within the budget always, never worse, repeatable, and the knapsack's on sums."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from bipdeploy import api
from bipdeploy.data.calibration import calibration_batches
from bipdeploy.errors import RecipeError
from bipdeploy.model.blocks import BlockWalker
from bipdeploy.model.families import BlockWidths, Heads
from bipdeploy.pruning import evolution
from bipdeploy.pruning.curves import Text, measured
from bipdeploy.pruning.evolution import Space
from bipdeploy.pruning.kept import keep
from bipdeploy.pruning.stitching import stitched
from bipdeploy.recipe import file
from bipdeploy.recipe.model import ModelSection
from bipdeploy.running import artifacts
from tests.sliced import (
    architecture_of,
    loaded,
    logits,
    masked_model,
    results,
    short_calibration,
    token_windows,
)
from tests.test_compare import recipe
from tests.test_search import drawn_scores

EVOLVED = ["prune.layers=evolved", "prune.round_to=8", "prune.search.points=4",
           "prune.search.windows=4", "prune.search.generations=4", "prune.search.offspring=4"]


def space(seed: int, parts: int = 5) -> tuple[Space, list[list[float]]]:
    """Parts of four levels with drawn costs, half of which may be spent, and what levels lose."""
    draw = torch.Generator().manual_seed(seed)
    costs = [torch.rand(4, generator=draw).cumsum(0).tolist() for _ in range(parts)]
    lost = [torch.rand(4, generator=draw).sort(descending=True).values.tolist()
            for _ in range(parts)]
    return Space(costs, (sum(c[0] for c in costs) + sum(c[-1] for c in costs)) / 2), lost


def of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(4))
def test_offspring_meet_the_budget_and_leave_room_for_no_level_more(seed):
    own, _ = space(seed)
    levels, seen, draw = (0,) * 5, set(), of(seed)
    for _ in range(200):
        levels = evolution.mutated(own, levels, draw)
        assert own.fits(levels) and all(0 <= level < 4 for level in levels)
        assert evolution.filled(own, levels, draw) == levels
        seen.add(levels)
    assert len(seen) > 3


@pytest.mark.parametrize("seed", range(6))
def test_where_losses_add_up_the_best_of_all_is_found_and_none_gets_worse(seed):
    own, lost = space(seed)

    def judge(levels: evolution.Levels, _: float) -> float:
        return sum(part[level] for part, level in zip(lost, levels, strict=True))

    found = evolution.evolve(own, (0,) * 5, judge, generations=60, offspring=16, generator=of(seed))
    best = min(judge(levels, 1.0) for levels in product(range(4), repeat=5) if own.fits(levels))
    assert found.losses[-1] == pytest.approx(best) == judge(found.levels, 1.0)
    assert found.losses == sorted(found.losses, reverse=True) and len(found.losses) == 61
    assert found == evolution.evolve(own, (0,) * 5, judge, generations=60, offspring=16,
                                     generator=of(seed))


def test_many_are_judged_by_little_text_and_few_by_all():
    own, lost = space(0, parts=12)
    asked: list[float] = []

    def judge(levels: evolution.Levels, share: float) -> float:
        asked.append(share)
        return sum(part[level] for part, level in zip(lost, levels, strict=True))

    evolution.evolve(own, (0,) * 12, judge, generations=1, offspring=16, generator=of(0))
    assert [asked.count(share) for share in (0.125, 0.5, 1.0)] == [
        pytest.approx(16, abs=4), 4, 1 + 2]


def test_where_everything_stays_there_is_nothing_to_evolve():
    own = Space([[1.0, 2.0]] * 3, 100.0)
    found = evolution.evolve(own, (0, 0, 0), lambda levels, _: float(-sum(levels)), generations=2,
                             offspring=4, generator=of(0))
    assert found.levels == (1, 1, 1)


def walker(model) -> BlockWalker:
    return BlockWalker(model, ModelSection(id=str(model), device="cpu", dtype="float32"))


def test_a_stitched_model_is_the_dense_one_with_the_groups_masked(variant):
    arch, ids = architecture_of(variant), token_windows(3, 24)
    scores = drawn_scores(arch)
    offered = {"heads": [Heads(1, arch.blocks[0].group), arch.blocks[0].attention],
               "ffn": [40, 64, arch.blocks[0].intermediate]}
    model = stitched(walker(variant), Text(list(ids.split(2)), [], None), scores,
                     lambda _, part: offered[part])
    expected = logits(loaded(variant), ids).log_softmax(-1)
    for picks in ((0, 0, 1, 2, 0, 1), (1, 2, 0, 1, 1, 0)):
        widths = [BlockWidths(0, 0, offered["ffn"][f]).having(offered["heads"][h])
                  for h, f in zip(picks[::2], picks[1::2], strict=True)]
        kept = [keep(s, w) for s, w in zip(scores, widths, strict=True)]
        masked = logits(masked_model(variant, kept), ids).log_softmax(-1)
        by_hand = (expected.exp() * (expected - masked)).sum(-1)
        assert model.divergence(widths) == pytest.approx(float(by_hand.mean()), rel=1e-3)
        assert model.divergence(widths, 1 / 3) == pytest.approx(float(by_hand[0].mean()), rel=1e-3)
    assert model.divergence(arch.blocks) == pytest.approx(0, abs=1e-9)


def test_a_single_part_costs_what_its_curve_says_refitted_too(tiny):
    arch, ids = architecture_of(tiny), token_windows(12, 32)
    scores, text = drawn_scores(arch), Text(list(ids[:4].split(2)), list(ids[4:].split(2)), 0.01)

    def widths(_: int, part: str):
        return [Heads(1, 2)] if part == "heads" else [48]

    curves = measured(walker(tiny), text, scores, widths)
    model = stitched(walker(tiny), text, scores, widths)
    for curve in curves:
        changed = list(arch.blocks)
        changed[curve.block] = changed[curve.block].having(curve.widths[0])
        assert model.divergence(changed) == pytest.approx(curve.divergences[0], rel=1e-3)


def test_widths_evolve_within_the_budget_and_the_same_each_time(tiny, tmp_path):
    settings = [*short_calibration(tmp_path), *EVOLVED]
    scores = api.score(str(tiny), tmp_path / "scores", settings)
    one, two = (api.prune(str(tiny), scores, tmp_path / name, 0.3, settings)
                for name in ("one", "two"))
    assert results(one) == results(two)
    record = artifacts.read_json(one / "kept.json")
    arch = architecture_of(tiny)
    spent = sum(arch.block_parameters(i, BlockWidths(b["heads"], b["kv_heads"], b["intermediate"]))
                for i, b in enumerate(record["blocks"]))
    assert spent <= 0.7 * sum(map(arch.block_parameters, range(3)))
    losses = record["search"]["divergence_by_generation"]
    assert losses == sorted(losses, reverse=True) and len(losses) == 5
    assert (record["layers"], record["search"]["divergence"]) == ("evolved", losses[-1])
    other = api.prune(str(tiny), scores, tmp_path / "flops", None, [
        *settings, "prune.target={flops: 0.3}", "prune.heads=both"])
    target = artifacts.read_json(other / "kept.json")["target"]
    assert target["reached"] >= target["asked"]


def test_evolved_widths_are_compared(tmp_path):
    """On the built-in model, within a rounding unit of every block."""
    own = recipe("builtin:pico", tmp_path, {"methods": ["llm_bip_joint@evolved"],
                                            "repairs": ["refit"]},
                 ["prune.search.generations=2", "prune.search.offspring=4"])
    found = api.compare(own, tmp_path / "out")
    assert found.data["not_run"] == [] and found.measured == 1


@pytest.mark.parametrize(("setting", "said"), [
    ("prune.depth.ffn=1", "layers: evolved chooses widths for all parts"),
    ("prune.search.rounds=2", "layers: evolved meets the budget at once"),
    ("calibration.samples=1", "layers: evolved judges refits"),
    ("prune.search.offspring=0", "prune.search.offspring")])
def test_what_does_not_go_with_evolution_is_refused(setting, said):
    with pytest.raises(RecipeError) as raised:
        file.build({"name": "x", "model": {"id": "builtin:pico"}, "prune": {"ratio": 0.3},
                    "recover": {"refit": {"ridge": 0.01}}},
                   "test", ["prune.layers=evolved", setting])
    assert said in "\n".join(raised.value.faults)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_gpu_judges_as_a_cpu_does(tiny, tmp_path):
    own = file.build({"name": "x", "model": {"id": str(tiny)}, "prune": {"ratio": 0.3}}, "test",
                     short_calibration(tmp_path))
    drawn = torch.cat(calibration_batches(own, tiny, 256)[0])
    arch, found = architecture_of(tiny), []
    widths = [w.having(48) for w in arch.blocks]
    for device in ("cpu", "cuda"):
        section = ModelSection(id=str(tiny), device=device, dtype="float32")
        model = stitched(BlockWalker(tiny, section), Text([drawn[:2]], [drawn[2:]], 0.1),
                         drawn_scores(arch), lambda _, part: [48] if part == "ffn" else [])
        found.append(model.divergence(widths))
    assert found[1] == pytest.approx(found[0], rel=1e-2)
