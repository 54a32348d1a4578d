"""Exchanging groups: every change is exact, the error never rises, no single swap is left."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from bipdeploy import api
from bipdeploy.errors import InputError
from bipdeploy.pruning import elimination, swaps
from bipdeploy.recipe import file as recipe_file
from bipdeploy.running import artifacts
from tests.sliced import results, short_calibration
from tests.test_compare import recipe
from tests.test_elimination import RIDGE, problem, refitted_error


class Problem:
    """12 inputs in groups, half of which stay; errors by brute force."""

    def __init__(self, seed: int, size: int):
        z, self.weight = problem(12, 5, seed)
        self.gram, self.size, self.count = z.T @ z, size, 12 // size
        self.damped = elimination.damped(self.gram, RIDGE)
        self.start = torch.zeros(self.count, dtype=torch.bool)
        order = elimination.costs(self.gram, self.weight, size)
        self.start[order.topk(self.count // 2).indices] = True

    def error(self, stays: torch.Tensor) -> float:
        return refitted_error(self.damped, self.weight,
                              stays.repeat_interleave(self.size).nonzero().flatten().tolist())

    def neighbours(self, stays: torch.Tensor):
        for out in stays.nonzero().flatten():
            for into in (~stays).nonzero().flatten():
                other = stays.clone()
                other[out], other[into] = False, True
                yield other

    def improved(self, **settings) -> torch.Tensor:
        return swaps.improved(self.gram, self.weight, self.start, self.size, **settings)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_changes_are_those_of_solving_anew(size):
    own = Problem(0, size)
    state = swaps.Swept(own.damped.clone(), own.weight, own.start.repeat_interleave(size))
    stays = own.start.clone()
    for _ in range(4):  # after moves too, that come back to nothing
        inside, outside = stays.nonzero().flatten(), (~stays).nonzero().flatten()
        found = state.changes(inside, outside, size).flatten().tolist()
        before = own.error(stays)
        assert found == pytest.approx([own.error(other) - before
                                       for other in own.neighbours(stays)], abs=1e-9 * state.energy)
        out, into = inside[0], outside[-1]
        state.move(out, size, inwards=False)
        state.move(into, size, inwards=True)
        stays[out], stays[into] = False, True


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_search_ends_where_no_swap_helps_and_often_at_the_best_of_all(size):
    best_found = greedy_best = 0
    for seed in range(12):
        own = Problem(seed, size)
        found = own.improved()
        error = own.error(found)
        assert int(found.sum()) == own.count // 2 and torch.equal(found, own.improved())
        assert error <= own.error(own.start) * (1 + 1e-9)
        assert min(map(own.error, own.neighbours(found))) >= error * (1 - 1e-9)
        best = min(own.error(torch.tensor([g in kept for g in range(own.count)]))
                   for kept in combinations(range(own.count), own.count // 2))
        best_found += error <= best * (1 + 1e-9)
        greedy_best += own.error(own.start) <= best * (1 + 1e-9)
    assert best_found >= 8 and best_found > greedy_best


def test_every_swap_lowers_the_error_up_to_their_bound():
    own = next(p for p in (Problem(seed, 1) for seed in range(40))
               if int((p.improved() != p.start).sum()) >= 4)
    errors = [own.error(own.improved(swaps=count)) for count in range(4)]
    assert errors[0] == own.error(own.start)
    assert errors[0] > errors[1] > errors[2] >= errors[3]


@pytest.mark.parametrize("stays", [[True] * 4, [False] * 4])
def test_where_all_or_none_stay_there_is_nothing_to_exchange(stays):
    z, weight = problem(8, 3, 0)
    assert swaps.improved(z.T @ z, weight, torch.tensor(stays), 2).tolist() == stays


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("size", [1, 3])
def test_a_gpu_finds_the_same(size):
    own = Problem(3, size)
    found = swaps.improved(own.gram.cuda(), own.weight.cuda(), own.start, size)
    assert torch.equal(found, own.improved())


def test_osscar_chooses_for_the_widths_of_the_recipe_and_for_no_others(tiny, tmp_path):
    settings = [*short_calibration(tmp_path), "score.criterion=osscar", "prune.round_to=8"]
    found = []
    for attempt in ("one", "two"):
        scores = api.score(str(tiny), tmp_path / attempt / "score", [*settings, "prune.ratio=0.3"])
        pruned = api.prune(str(tiny), scores, tmp_path / attempt / "prune", 0.3, settings)
        found.append((results(scores), results(pruned)))
    assert found[0] == found[1]
    widths = artifacts.read_json(scores / "scores.json")["widths"]
    kept = artifacts.read_json(pruned / "kept.json")["blocks"]
    assert [w["intermediate"] for w in widths] == [len(b["kept_channels"]) for b in kept]
    for ratio, more in ((0.4, []), (0.3, ["prune.layers=global"]), (0.3, ["prune.depth.ffn=1"])):
        with pytest.raises(InputError, match="chooses for the widths that it is told"):
            api.prune(str(tiny), scores, tmp_path / "other", ratio, [*settings, *more])


@pytest.mark.parametrize("setting", ["prune.layers=global", "prune.layers=searched",
                                     "prune.depth.ffn=1"])
def test_osscar_is_refused_where_widths_depend_on_scores(setting):
    own = recipe_file.build({"name": "x", "model": {"id": "builtin:pico"}, "prune": {"ratio": 0.3}},
                            "test", ["score.criterion=osscar", setting])
    with pytest.raises(InputError, match=r"score\.criterion: osscar .*layers to uniform"):
        api.plan(own)


def test_osscar_is_compared_at_each_ratio_by_scores_of_its_own(tiny, tmp_path):
    own = recipe(tiny, tmp_path, {"methods": ["osscar", "llm_bip_joint"], "ratios": [0.3, 0.4],
                                  "repairs": ["refit"]})
    found = api.compare(own, tmp_path / "out")
    assert found.data["not_run"] == [] and found.measured == 4
    with pytest.raises(InputError, match="osscar chooses for widths"):
        api.compare(recipe(tiny, tmp_path, {"methods": ["flap@global", "osscar@global"]}),
                    tmp_path / "out")
