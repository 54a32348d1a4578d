"""Stage `curves`: measured once for all budgets, read by prune, shared by trials, checked."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from bipdeploy import api
from bipdeploy.errors import InputError
from bipdeploy.model.families import Heads
from bipdeploy.pipeline import pipeline
from bipdeploy.pipeline.keys import stage_keys
from bipdeploy.planning import footprint
from bipdeploy.planning.resolved import resolve
from bipdeploy.pruning.kept import BlockScores
from bipdeploy.pruning.search import Curve
from bipdeploy.pruning.sensitivity import weighted
from bipdeploy.recipe import file
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.running import artifacts
from bipdeploy.stages import curves as measuring
from bipdeploy.sweeping import command, running, trials
from tests.running import bipdeploy_here, refused
from tests.sliced import architecture_of, results, short_calibration
from tests.tiny import tiny_model

SEARCHED = ["prune.layers=searched", "prune.round_to=8", "prune.search.points=3",
            "prune.search.windows=4", "evaluate.perplexity.enabled=false",
            "bench.torch.enabled=false"]


def recipe(model, folder: Path, *settings: str, name: str = "run"):
    return file.build({"name": name, "model": {"id": str(model)}, "prune": {"ratio": 0.3}}, "test",
                      [*short_calibration(folder), *SEARCHED, *settings])


def ran(own, runs: Path, until: str = "prune") -> list[str]:
    return pipeline.run(own, runs, until=until).ran


@pytest.fixture
def measurements(monkeypatch) -> list[int]:
    """Grows with every measurement of a model's curves."""
    counted, real = [], measuring.measured

    def counting(*arguments):
        counted.append(1)
        return real(*arguments)

    monkeypatch.setattr(measuring, "measured", counting)
    return counted


# Measured once

def test_two_budgets_share_one_measurement_and_get_what_each_would_alone(
        tiny, tmp_path, measurements):
    assert ran(recipe(tiny, tmp_path), tmp_path) == ["score", "curves", "prune"]
    for budget in (["prune.ratio=0.4"], ["prune.ratio=null", "prune.target={flops: 0.2}"]):
        assert ran(recipe(tiny, tmp_path, *budget), tmp_path) == ["prune"]
    assert len(measurements) == 1
    ran(recipe(tiny, tmp_path, "prune.ratio=0.4"), tmp_path)
    scores = tmp_path / "run" / "score"
    settings = [*short_calibration(tmp_path), *SEARCHED]
    alone = api.prune(str(tiny), scores, tmp_path / "alone", 0.4, settings)
    assert len(measurements) == 2
    assert results(alone) == results(tmp_path / "run" / "prune")


def test_rounds_after_the_first_measure_the_repaired_model(tiny, tmp_path, measurements):
    assert ran(recipe(tiny, tmp_path), tmp_path)[1] == "curves"
    assert ran(recipe(tiny, tmp_path, "prune.search.rounds=2"), tmp_path) == ["prune"]
    assert len(measurements) == 2
    kept = artifacts.read_json(tmp_path / "run" / "prune" / "kept.json")["search"]
    made = artifacts.read_json(tmp_path / "run" / "curves" / "curves.json")
    assert {name: kept[name] for name in made} == made


def test_nothing_is_measured_where_nothing_reads_it(tiny, tmp_path, measurements):
    assert ran(recipe(tiny, tmp_path, "prune.layers=uniform"), tmp_path)[1] == "curves"
    assert ran(recipe(tiny, tmp_path, "prune.layers=adaptive"), tmp_path) == ["prune"]
    assert measurements == []
    assert artifacts.read_json(tmp_path / "run" / "curves" / "curves.json") == {"measured": False}
    assert ran(recipe(tiny, tmp_path), tmp_path) == ["curves", "prune"]


@pytest.mark.parametrize(("setting", "first"), [
    ("prune.ratio=0.5", "prune"), ("prune.search.rounds=2", "prune"),
    ("recover.refit.reselect=true", "recover"), ("tune.enabled=true", "tune"),
    ("calibration.spill=true", None), ("prune.search.points=4", "curves"),
    ("prune.search.windows=3", "curves"), ("prune.search.propagation=measured", "curves"),
    ("prune.round_to=16", "curves"), ("prune.protect.first=1", "curves"),
    ("prune.heads=both", "curves"), ("prune.ffn=false", "curves"),
    ("hardware.tensor_parallel=2", "curves"), ("recover.refit.ridge=0.1", "curves"),
    ("recover.method=none", "curves"), ("model.dtype=float32", "score"), ("seed=1", "score")])
def test_curves_depend_on_what_they_measure_and_not_on_the_budget(tiny, tmp_path, setting, first):
    before, after = (stage_keys(resolve(recipe(tiny, tmp_path, *own))) for own in ([], [setting]))
    changed = [name for name in before if before[name] != after[name]]
    assert (changed or [None])[0] == first


def test_repairs_that_fit_nothing_share_curves(tiny, tmp_path):
    keys = [stage_keys(resolve(recipe(tiny, tmp_path, f"recover.method={method}")))
            for method in ("none", "bias")]
    assert keys[0]["curves"] == keys[1]["curves"]


def test_an_interrupted_measurement_leaves_nothing_and_is_made_again(
        tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(measuring.curves, "sensed", lambda *_: 1 / 0)
        with pytest.raises(Exception, match="stage curves failed"):
            ran(recipe(tiny, tmp_path), tmp_path)
    assert not (tmp_path / "run" / "curves").exists()
    assert ran(recipe(tiny, tmp_path), tmp_path) == ["curves", "prune"]
    (tmp_path / "run" / "curves" / "curves.json").write_text("{")  # cut off
    assert ran(recipe(tiny, tmp_path), tmp_path) == ["curves"]


def test_a_run_that_was_made_before_there_was_the_stage_is_made_again_and_says_so(
        tiny, tmp_path):
    own = recipe(tiny, tmp_path)
    ran(own, tmp_path)
    shutil.rmtree(tmp_path / "run" / "curves")
    for name in ("score", "prune"):
        path = tmp_path / "run" / name / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["environment"]["code"], manifest["key"] = "0.0.1+abc", "another"
        path.write_text(json.dumps(manifest))
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["stages"]["curves"]
    path.write_text(json.dumps(manifest))
    assert ran(own, tmp_path) == ["score", "curves", "prune"]
    (note,) = [n for n in artifacts.read_manifest(tmp_path / "run" / "score")["notes"]
               if "0.0.1" in n]
    assert note.startswith("score, prune: made by bipdeploy 0.0.1+abc, and run again by ")


def test_trials_of_two_ratios_share_their_curves(tiny, tmp_path, measurements):
    text = tmp_path / "test.txt"
    text.write_text(" ".join(f"word{i % 97} of line {i}" for i in range(600)))
    swept = file.build(
        {"name": "x", "model": {"id": str(tiny)}, "prune": {"ratio": 0.5},
         "evaluate": {"perplexity": {"data": str(text), "windows": [32], "max_tokens": 256}},
         "sweep": {"ratios": [0.2, 0.3], "rough_windows": 2, "max_perplexity_ratio": 1e-3}},
        "test", [*short_calibration(tmp_path), *SEARCHED[:4]])
    found = trials.plan(swept).trials
    for trial in found:
        running.run(command._task(swept, trial, tmp_path))  # stops after the repair, by its limit
    one, other = (tmp_path / "trials" / t.name / "curves" / "curves.json" for t in found)
    assert one.samefile(other) and len(measurements) == 1


# On plain paths

def test_curves_on_plain_paths_give_what_a_search_of_its_own_does(tiny, tmp_path):
    settings = [*short_calibration(tmp_path), *SEARCHED]
    scores = api.score(str(tiny), tmp_path / "scores", settings)
    made = api.curves(str(tiny), scores, tmp_path / "curves", settings[:-6] + SEARCHED[1:])
    whole = api.prune(str(tiny), scores, tmp_path / "whole", 0.3, settings)
    given = api.prune(str(tiny), scores, tmp_path / "given", 0.3, settings[:-6] + SEARCHED[1:],
                      curves=made)
    assert results(given) == results(whole)
    assert artifacts.read_manifest(made)["sections"]["recover.fitting"] == "auto"


def test_curves_of_something_else_are_one_line(tiny, tmp_path):
    settings = [*short_calibration(tmp_path), *SEARCHED]
    scores = api.score(str(tiny), tmp_path / "scores", settings)
    made = api.curves(str(tiny), scores, tmp_path / "curves", settings)

    def faults(model, of_model: Path, curves: Path, *more: str) -> str:
        with pytest.raises(InputError) as raised:
            api.prune(str(model), of_model, tmp_path / "out", 0.3, [*settings, *more],
                      curves=curves)
        assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()
        return str(raised.value)

    assert "holds no measured curves; give what `bipdeploy curves` wrote" in faults(
        tiny, scores, scores)
    for more in (["prune.heads=both"], ["prune.round_to=16"], ["prune.protect.first=1"]):
        assert "prune.heads, ffn, protect and round_to" in faults(tiny, scores, made, *more)
    deeper = tiny_model(tmp_path / "deeper", blocks=4)
    of_deeper = api.score(str(deeper), tmp_path / "of_deeper", settings)
    assert "of another model" in faults(deeper, of_deeper, made)
    with pytest.raises(InputError, match=r"the scores in .* are not of this model"):
        api.curves(str(deeper), scores, tmp_path / "out", settings)


def test_the_command_writes_curves_and_refuses_scores_that_are_not_there(tiny, tmp_path):
    options = [word for own in [*short_calibration(tmp_path), *SEARCHED]
               for word in ("--set", own)]
    refused(bipdeploy_here("curves", tiny, tmp_path / "nowhere", "--out", tmp_path / "c", *options),
            2, "nowhere")
    assert bipdeploy_here("score", tiny, "--out", tmp_path / "s", *options).returncode == 0
    done = bipdeploy_here("curves", tiny, tmp_path / "s", "--out", tmp_path / "c", *options)
    assert done.returncode == 0 and f"wrote {tmp_path / 'c'}" in done.stdout.replace("\n", "")
    done = bipdeploy_here("prune", tiny, tmp_path / "s", "--curves", tmp_path / "c", "--ratio",
                          "0.3", "--out", tmp_path / "p", *options)
    assert done.returncode == 0, done.stderr


# Planned

def test_a_plan_shows_the_search_in_a_row_of_its_own(tiny, tmp_path):
    def rows(*settings: str) -> dict[str, footprint.Stage]:
        resolved = resolve(recipe(tiny, tmp_path, *settings))
        sized = footprint.sizes(resolved, resolved.exported(resolved.uniform))
        return footprint.stages(sized, {"flops": 1e9, "bandwidth": 1e9})

    searched, uniform = rows(), rows("prune.layers=uniform")
    assert list(searched)[:3] == ["score", "curves", "prune"]
    assert uniform["curves"].seconds == uniform["curves"].memory == 0
    assert searched["curves"].seconds > 0 and searched["curves"].memory > 0
    assert searched["prune"] == uniform["prune"]
    again = rows("prune.search.rounds=3")
    assert again["curves"] == searched["curves"]
    assert again["prune"].seconds > 2 * searched["curves"].seconds
    assert again["prune"].memory >= searched["curves"].memory


# Weights of a global ranking

def test_weighted_scores_add_up_to_what_half_a_part_costs_and_rank_as_before(tiny):
    arch = architecture_of(tiny)
    draw = random.Random(0)
    scores = [BlockScores([draw.random() for _ in range(w.kv_heads)],
                          [draw.random() for _ in range(w.intermediate)]) for w in arch.blocks]
    found = weighted(arch, scores, [
        Curve(block, part, list(widths), [4.0 * (block + 1), 0.0])
        for block, w in enumerate(arch.blocks) for part, widths in (
            ("heads", (Heads(w.kv_heads // 2, w.group), w.attention)),
            ("ffn", (w.intermediate // 2, w.intermediate)))])
    for block, (before, after) in enumerate(zip(scores, found, strict=True)):
        for part in ("heads", "ffn"):
            plain, own = getattr(before, part), getattr(after, part)
            assert sum(sorted(own)[:len(own) // 2]) == pytest.approx(4 * (block + 1))
            assert sorted(range(len(own)), key=own.__getitem__) == sorted(
                range(len(own)), key=plain.__getitem__)


def test_a_global_ranking_is_weighed_by_curves_where_that_is_asked_for(
        tiny, tmp_path, measurements):
    ranked = ["prune.layers=global", "evaluate.perplexity.enabled=false"]
    assert ran(recipe(tiny, tmp_path, *ranked), tmp_path) == ["score", "curves", "prune"]
    plain = artifacts.read_json(tmp_path / "run" / "prune" / "kept.json")
    assert measurements == [] and "search" not in plain
    ranked += ["prune.global_weights=sensitivity"]
    assert ran(recipe(tiny, tmp_path, *ranked), tmp_path) == ["curves", "prune"]
    made = artifacts.read_json(tmp_path / "run" / "prune" / "kept.json")
    assert made["blocks"] != plain["blocks"] and made["search"]["windows"] == 4
    assert artifacts.figures([tmp_path / "run" / "prune"])["block_parameters.ratio"] == (
        pytest.approx(0.7, abs=0.03))
    assert ran(recipe(tiny, tmp_path), tmp_path) == ["prune"]  # a search reads the same curves
    assert len(measurements) == 1


def test_weights_are_known_by_name(tiny, tmp_path):
    with pytest.raises(InputError, match=r"prune\.global_weights: .*'none' or 'sensitivity'"):
        recipe(tiny, tmp_path, "prune.global_weights=fisher")


@pytest.mark.parametrize("prune", [
    {"layers": "searched"}, {"layers": "evolved"},
    {"layers": "global", "global_weights": "sensitivity"}])
def test_curves_need_windows_that_their_refits_have_not_seen(prune):
    def recipe(samples: int) -> Recipe:
        return Recipe.model_validate({
            "name": "r", "model": {"id": "builtin:pico"}, "prune": {"ratio": 0.3, **prune},
            "calibration": {"data": "builtin:pydocs", "samples": samples}})

    assert recipe(3).recover.refit.ridge == "auto"
    with pytest.raises(ValueError, match=r"calibration\.samples is 2; give at least 3"):
        recipe(2)
