"""What a run on a CPU takes is said before it starts, where that is long."""

from __future__ import annotations

import pytest

from bipdeploy.planning import footprint, gpus, outlook
from bipdeploy.planning.resolved import Resolved, resolve
from bipdeploy.recipe import file
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.running import machine
from bipdeploy.stages.table import STAGES
from tests.running import RECIPES

MACHINE = {"flops": 5e10, "bandwidth": 1e10}


def recipe(*settings: str) -> Recipe:
    return file.load(RECIPES / "llama7b-30.yaml", ["model.device=cpu", *settings])


def resolved_7b(*settings: str) -> Resolved:
    """By the shape that the recipe states: the model itself is not here."""
    return resolve(recipe(*settings))


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(machine, "hardware", lambda: {"gpus": [], "memory_bytes": 1 << 40})
    monkeypatch.setattr(outlook.cpu_peak, "measured", lambda: MACHINE)


def test_a_7b_model_on_a_cpu_takes_hours_and_what_helps_is_named(no_gpu):
    lines = outlook.notes(resolved_7b(), list(STAGES))
    assert lines[0].startswith("on this CPU the run takes at least ")
    assert "hours" in lines[0]
    assert any("prune.search" in line or "recover.refit.ridge" in line or "tune." in line
               for line in lines[1:])


def test_the_time_is_that_of_the_stages_that_run(no_gpu):
    resolved = resolved_7b()
    sized = footprint.sizes(resolved, resolved.exported(resolved.uniform))
    seconds = footprint.seconds(sized, **MACHINE)["score"]
    assert outlook.notes(resolved, ["score"])[0].startswith(
        f"on this CPU the run takes at least {outlook._time(seconds)}: score")
    assert outlook.notes(resolved, ["gate", "report"]) == []


def test_nothing_is_said_of_a_gpu(no_gpu, monkeypatch):
    monkeypatch.setattr(machine, "hardware", lambda: {"gpus": ["H100"], "memory_bytes": 1 << 40})
    on_any = resolved_7b("model.device=auto")
    assert outlook.notes(on_any, list(STAGES)) == []
    assert outlook.notes(resolved_7b(), list(STAGES))


def test_a_small_model_is_not_even_measured(monkeypatch):
    monkeypatch.setattr(outlook.cpu_peak, "measured", lambda: pytest.fail("measured"))
    resolved = resolve(file.load(RECIPES / "quickstart.yaml", ["model.device=cpu"]))
    assert outlook.notes(resolved, list(STAGES)) == []


@pytest.mark.parametrize(("stage", "settings", "named"), [
    ("curves", ["prune.layers=searched", "prune.search.propagation=measured"], "sensitivity"),
    ("prune", ["prune.layers=searched", "prune.search.rounds=3"], "rounds: 1")])
def test_the_cheaper_setting_fits_the_recipe(stage, settings, named):
    assert named in outlook.cheaper(stage, recipe(*settings))
    assert all(name in STAGES for name in ("score", "prune", "recover", "tune", "evaluate"))


def test_systems_are_priced_in_float64_and_sums_in_float32():
    resolved = resolved_7b("score.criterion=llm_bip_joint")
    sized = footprint.sizes(resolved, resolved.exported(resolved.uniform))
    tokens = resolved.recipe.calibration.windows * resolved.recipe.calibration.tokens
    cubes = sum(2 * size ** 3 for size in (4096, 11008)) * 32
    squares = sum(2 * tokens * size ** 2 for size in (4096, 11008)) * 32

    def score(**rates: float) -> float:
        return footprint.seconds(sized, 1e15, 1e15, **rates)["score"]

    assert score(double=1e15 / 64) - score() == pytest.approx(63 * cubes / 1e15)
    assert score(single=1e15 / 16) - score() == pytest.approx(15 * squares / 1e15)
    for gpu in gpus.GPUS.values():
        assert gpu.double <= gpu.single <= gpu.flops
