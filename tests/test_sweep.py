"""Sweeps: which trials there are, what they share, the front, the command, sweeps on Ray."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
import threading
from types import SimpleNamespace

import pytest

from bipdeploy import api
from bipdeploy.cli import options
from bipdeploy.errors import InputError, RecipeError
from bipdeploy.pipeline.keys import intact
from bipdeploy.recipe import file as recipe_file
from bipdeploy.running import artifacts
from bipdeploy.sweeping import command, plot, results, running, sharing, trials
from tests.running import bipdeploy_here, refused
from tests.sliced import architecture_of, short_calibration

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None,
                               reason="ray is not installed; pip install 'bipdeploy[sweep]'")


def on_ray(test):
    """Starts Ray, and a process per trial: tens of seconds, minutes on a busy machine."""
    return pytest.mark.slow(pytest.mark.timeout(900)(needs_ray(test)))


def recipe(model, folder, sweep: dict, settings: list[str] | None = None):
    """A recipe that sweeps on a tiny model with little text and short timing."""
    text = folder / "test.txt"
    text.write_text(" ".join(f"word{i % 97} of line {i}" for i in range(600)))
    return recipe_file.build(
        {"name": "x", "model": {"id": str(model)}, "prune": {"ratio": 0.5, "round_to": 8},
         "evaluate": {"perplexity": {"data": str(text), "windows": [32], "max_tokens": 512}},
         "bench": {"torch": {"prompt_tokens": 8, "new_tokens": 2, "repeats": 3, "warmup": 0,
                             "memory": False}},
         "sweep": {"engine": {"cpus": 1}, "rough_windows": 4, **sweep}},
        "test", [*short_calibration(folder), *(settings or [])])


def planned(model, folder, **sweep):
    return trials.plan(recipe(model, folder, sweep)).trials


# What is run

def test_text_by_rule_is_resolved_for_every_trial(tiny, tmp_path):
    """Also where what is swept, the window, changes how many there are."""
    own = recipe(tiny, tmp_path, {"fields": {"calibration.tokens_per_channel": [4, 8],
                                             "calibration.tokens": [16, 32]}},
                 ["calibration.samples=null"])
    widest = architecture_of(tiny).widest
    assert {t.label: t.recipe.calibration.windows for t in trials.plan(own).trials} == {
        f"calibration.tokens_per_channel {n}, calibration.tokens {tokens}": -(-n * widest // tokens)
        for n in (4, 8) for tokens in (16, 32)}


def test_every_combination_is_one_trial_made_by_overrides(tiny, tmp_path):
    found = planned(tiny, tmp_path, ratios=[0.4, 0.3], criteria=["flap", "llm_bip:measured"],
                    fields={"recover.refit.ridge": [0.01, "auto"]})
    assert [t.label for t in found][:3] == [
        "30%, flap, recover.refit.ridge 0.01", "30%, flap, recover.refit.ridge auto",
        "30%, llm_bip:measured, recover.refit.ridge 0.01"]
    assert len({t.name for t in found}) == len({t.key for t in found}) == 8
    last = found[-1]
    assert (last.recipe.prune.ratio, last.recipe.score.propagation,
            last.recipe.recover.refit.ridge) == (0.4, "measured", "auto")
    own = recipe(tiny, tmp_path, {}, list(last.settings))
    assert own.model_copy(update={"name": last.name, "sweep": last.recipe.sweep}) == last.recipe
    assert "--set prune.ratio=0.4" in last.command("r.yaml")


def test_layers_and_repairs_are_those_of_a_comparison(tiny, tmp_path):
    found = planned(tiny, tmp_path, layers=["uniform", "depth:ffn"],
                    repairs=["none", "refit_auto"])
    assert [(t.recipe.prune.depth.ffn, t.recipe.recover.method) for t in found] == [
        (0, "none"), (0, "refit"), (1, "none"), (1, "refit")]
    assert found[1].recipe.recover.refit.ridge == "auto"


def test_a_ratio_takes_the_place_of_a_target_and_a_target_that_of_a_ratio(tiny, tmp_path):
    swept = trials.plan(recipe(tiny, tmp_path, {"ratios": [0.2, 0.3]}, [
        "prune.ratio=null", "prune.target={flops: 0.3}"])).trials
    assert [(t.recipe.prune.ratio, t.recipe.prune.target) for t in swept] == [
        (0.2, None), (0.3, None)]
    swept = planned(tiny, tmp_path, fields={"prune.target.flops": [0.2, 0.3]})
    assert [(t.recipe.prune.ratio, t.recipe.prune.target.flops) for t in swept] == [
        (None, 0.2), (None, 0.3)]


def test_combinations_that_give_the_same_model_are_one_trial(tiny, tmp_path):
    found = planned(tiny, tmp_path, repairs=["none", "refit"],
                    fields={"recover.refit.ridge": [0.01, 0.1]})
    assert [t.label for t in found] == [
        "none, recover.refit.ridge 0.01", "refit, recover.refit.ridge 0.01",
        "refit, recover.refit.ridge 0.1"]


def test_more_samples_keep_the_earlier_ones(tiny, tmp_path):
    axes = {"ratios": [0.2, 0.3, 0.4, 0.5], "criteria": ["flap", "magnitude", "random"]}
    few, more, every = ({t.name for t in planned(tiny, tmp_path, samples=count, **axes)}
                        for count in (3, 6, None))
    assert few < more < every
    assert [len(few), len(more), len(every)] == [3, 6, 12]


def test_trials_that_only_differ_in_quality_are_rivals(tiny, tmp_path):
    found = planned(tiny, tmp_path, ratios=[0.3, 0.4], criteria=["flap", "magnitude"])
    assert [t.rivals == found[0].rivals for t in found] == [True, True, False, False]


@pytest.mark.parametrize(("sweep", "words"), [
    ({}, ("nothing varies",)),
    ({"ratios": [0.3]}, ("nothing varies",)),
    ({"fields": {"score.kriterion": ["flap"]}}, ("sweep.fields.score.kriterion: unknown field",
                                                 "'criterion'")),
    ({"fields": {"prune.ratio.x": [1], "sweep.samples": [1]}},
     ("prune.ratio.x: unknown", "sweep.samples: unknown")),
    ({"fields": {"prune.round_to": [8, -1], "recover.method": ["refit", "mend"]}},
     ("prune.round_to: -1", "recover.method: \"mend\"")),
    ({"ratios": [0.3], "fields": {"evaluate.perplexity.enabled": [True, False]}},
     ("evaluate.perplexity.enabled: false",)),
    ({"ratios": [0.3, 0.99]}, ("prune.ratio: 0.99",)),
    ({"ratios": [0.3], "fields": {"prune.ratio": [0.2, 0.4]}}, ("prune.ratio", "leave one")),
    ({"repairs": ["none", "refit"], "fields": {"recover": [{"method": "bias"}]}},
     ("sweep.fields.recover", "leave one")),
])
def test_what_cannot_be_run_is_refused_before_anything_is(tiny, tmp_path, sweep, words):
    with pytest.raises(InputError) as raised:
        api.sweep(recipe(tiny, tmp_path, sweep), tmp_path / "out")
    for word in words:
        assert word in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_unknown_names_are_refused_with_those_that_were_meant():
    with pytest.raises(RecipeError) as raised:
        recipe_file.build({"name": "x", "model": {"id": "builtin:pico"}, "prune": {"ratio": 0.3},
                           "sweep": {"criteria": ["flip"], "layers": ["serched"],
                                     "repairs": ["refitt"], "ratios": [2], "fields": {"seed": []},
                                     "engine": {"concurrent": 0}}}, "r")
    faults = "\n".join(raised.value.faults)
    for words in ("did you mean 'flap'?", "did you mean 'searched'?", "did you mean 'refit'?",
                  "sweep.ratios.0: 2", "sweep.fields.seed", "sweep.engine.concurrent: 0"):
        assert words in faults


def test_options_stand_for_fields_of_the_section():
    made = options.sweep_settings(
        {"ratios": "0.2,0.3", "criteria": "flap", "layers": None},
        ["recover.refit.ridge=0.1,auto", "seed=0,1", 'prune.protect={"first": 1},{"last": 1}'],
        {"samples": 3, "engine.gpus": None})
    assert made == ["sweep.ratios=[0.2, 0.3]", 'sweep.criteria=["flap"]', "sweep.samples=3",
                    'sweep.fields={"recover.refit.ridge": [0.1, "auto"], "seed": [0, 1], '
                    '"prune.protect": [{"first": 1}, {"last": 1}]}']
    with pytest.raises(InputError, match="--vary 'seed'"):
        options.sweep_settings({}, ["seed"], {})


def test_without_ray_one_line_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"ray is not installed.*pip install 'bipdeploy\[sweep\]'"):
        api.sweep("recipes/smoke.yaml", tmp_path / "out", ["sweep.ratios=[0.2,0.3]"])


# What trials share

def test_while_one_trial_is_timed_no_other_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    events: list[str] = []

    def other(stage: str) -> threading.Thread:
        def wait() -> None:
            with sharing.turn(stage):
                events.append(stage)

        thread = threading.Thread(target=wait)
        thread.start()
        return thread

    with sharing.turn("bench"):
        waiting = [other("bench"), other("score")]
        waiting[1].join(0.2)
        events.append("timed")
    for thread in waiting:
        thread.join()
    assert events[0] == "timed"
    assert set(events) == {"timed", "bench", "score"}
    with sharing.turn("score"):
        other("recover").join(30)
        assert events[-1] == "recover"


def test_a_stage_that_another_trial_has_run_is_taken_over_without_a_copy(tmp_path, smoke):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    (one / "score").symlink_to(smoke.folder / "score")
    key = artifacts.read_manifest(smoke.folder / "score")["key"]
    with sharing.once("score", "another key", other):
        assert not other.exists()
    with sharing.once("score", key, other):
        assert intact(other / "score", key)
    path = other / "score" / "manifest.json"
    assert path.samefile(smoke.folder / "score" / "manifest.json")


class Ran:
    """As much of Ray's trial as its rule asks for; equal to nothing else, as that is."""

    def __init__(self, name: str):
        self.config, self.trial_id = {"trial": name}, name


@needs_ray
def test_the_median_rule_is_applied_among_rivals_and_to_repaired_models_only():
    from ray.tune.schedulers import TrialScheduler

    from bipdeploy.sweeping.engine import Rivals

    groups = {**dict.fromkeys("abcdef", "30%"), "g": "50%"}
    ran = {name: Ran(name) for name in groups}
    rivals = Rivals(groups, [("30%", 0.1), ("30%", 0.2)])

    def told(name: str, point: str, loss: float) -> bool:
        decision = rivals.on_trial_result(
            SimpleNamespace(get_live_trials=list), ran[name],
            {"point": running.POINTS[point], "loss": loss})
        assert decision in (TrialScheduler.CONTINUE, TrialScheduler.STOP)
        return decision == TrialScheduler.STOP

    assert not told("a", "repaired", 0.9)  # only two others
    assert not told("b", "prune", 9.0)
    assert not told("b", "repaired", 0.2)
    assert told("c", "repaired", 0.21)
    assert not told("g", "repaired", 5.0)  # smaller, and without rivals
    assert not told("d", "repaired", 0.01)
    assert not told("e", "repaired", 0.02)
    assert not told("b", "repaired", 0.2)  # Ray tells the last result again at a trial's end
    assert rivals.behind == {"c": 0.21}


def test_a_trial_that_cannot_finish_leaves_a_record_of_why(tiny, tmp_path):
    own = recipe(tiny, tmp_path, {"fields": {"calibration.samples": [16, 9999]}})
    trial = trials.plan(own).trials[1]
    running.run(command._task(own, trial, tmp_path))
    record = running.read(tmp_path / "trials" / trial.name, trial.key)
    assert record["state"] == "failed"
    assert "calibration.samples: the text has" in record["why"]
    assert not command._ended(own.sweep, record)


# What is shown

def finished(name: str, quality: float, prefill: float, decode: float | None = None) -> dict:
    figures = {"perplexity.ratio": quality, "prefill.speedup": prefill, "parameters.ratio": 0.5}
    return {"name": name, "label": name, "state": "finished", "failed_gates": [], "settings": [],
            "command": "", "rough": {}, "figures": figures | (
                {"decode.speedup": decode} if decode else {})}


STOPPED = {"name": "s", "label": "s", "state": "stopped", "after": "recover", "why": "too bad",
           "rough": {"repaired": 2.5}, "settings": [], "command": ""}


def test_the_front_is_what_no_other_trial_beats():
    found = [finished("a", 1.1, 1.2, 1.5), finished("b", 1.2, 1.4, 1.4),
             finished("c", 1.3, 1.3, 1.6), finished("d", 1.1, 1.2, 1.5), STOPPED]
    assert results.front(found, "prefill.speedup") == ["a", "d", "b"]
    assert results.front(found, "decode.speedup") == ["a", "d", "c"]
    assert [t["front"] for t in results.with_fronts(found)] == [
        ["prefill", "decode"], ["prefill"], ["decode"], ["prefill", "decode"], []]


def test_without_a_bench_parameters_are_weighed():
    found = [{**finished("a", 1.1, 1.0), "figures": {"perplexity.ratio": q, "parameters.ratio": p},
              "name": name} for name, q, p in (("a", 1.1, 0.8), ("b", 1.2, 0.7), ("c", 1.3, 0.75))]
    assert results.measures(found) == results.SIZE
    assert results.front(found, "parameters.ratio") == ["a", "b"]
    assert plot.draw(results.with_fronts(found)).startswith(b"\x89PNG")


def test_tables_say_who_was_stopped_and_why_with_the_rough_figure_marked():
    shown = results.with_fronts([finished("a", 1.1, 1.2, 1.5), STOPPED])
    assert results.table(shown) == [
        ["trial", "perplexity", "prefill", "decode", "parameters", "on the front of", "outcome"],
        ["a", "1.10x", "1.20x", "1.50x", "0.50x", "prefill, decode", "finished"],
        ["s", "~2.5x", "–", "–", "–", "–", "stopped after recover: too bad"]]
    heading, first, _ = results.as_csv(shown).splitlines()
    row = dict(zip(heading.split(","), first.split(","), strict=True))
    assert (row["name"], row["front"], row["perplexity.ratio"]) == ("a", "prefill decode", "1.1")


# Whole sweeps

@pytest.fixture(scope="module")
def swept(tiny, tmp_path_factory):
    """A grid of two ratios and two criteria on a tiny model, with its recipe."""
    folder = tmp_path_factory.mktemp("swept")
    own = recipe(tiny, folder, {"ratios": [0.3, 0.5], "criteria": ["magnitude", "flap"],
                                "engine": {"concurrent": 2, "cpus": 1}})
    return own, api.sweep(own, folder / "out")


def untimed(figures: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items()
            if name.split(".")[0] not in ("prefill", "decode", "ttft")}


@on_ray
def test_every_trial_has_the_figures_of_a_plain_run(swept, tmp_path):
    own, found = swept
    assert (found.ran, found.reused) == (4, 0)
    for trial in found.data["trials"]:
        assert trial["state"] == "finished", trial
        data = {**own.model_dump(mode="json"), "sweep": {}, "name": trial["name"]}
        plain = api.run(recipe_file.build(data, "test", trial["settings"]), runs=tmp_path)
        assert untimed(trial["figures"]) == untimed(plain.figures)
        assert set(trial["figures"]) == set(plain.figures)
        assert {"prefill.speedup", "decode.speedup"} <= set(trial["figures"])
    assert any(t["front"] for t in found.data["trials"])
    assert {p.name for p in found.folder.iterdir()} == {
        "trials", command.DATA, command.TABLE, command.PAGE, command.PICTURE}
    assert "no other trial ran on its machine" in (found.folder / command.PAGE).read_text()


@on_ray
def test_trials_of_one_criterion_share_its_scores(swept):
    _, found = swept
    folders = {}
    for trial in found.data["trials"]:
        folders.setdefault(trial["settings"][1], []).append(
            found.folder / "trials" / trial["name"] / "score" / "scores.safetensors")
    assert [len(paths) for paths in folders.values()] == [2, 2]
    assert all(one.samefile(other) for one, other in folders.values())


@on_ray
def test_a_second_call_runs_nothing_but_what_was_killed(swept, tmp_path):
    own, found = swept
    again = api.sweep(own, found.folder)
    assert (again.ran, again.reused) == (0, 4)
    assert again.data["trials"] == found.data["trials"]
    # As a kill leaves it: one trial without a record, and without its last stages.
    killed = found.folder / "trials" / found.data["trials"][0]["name"]
    (killed / running.RECORD).unlink()
    shutil.rmtree(killed / "bench")
    scored = (killed / "score" / artifacts.MANIFEST).stat().st_mtime_ns
    resumed = api.sweep(own, found.folder)
    assert (resumed.ran, resumed.reused) == (1, 3)
    assert (killed / "score" / artifacts.MANIFEST).stat().st_mtime_ns == scored
    assert untimed(resumed.data["trials"][0]["figures"]) == untimed(
        found.data["trials"][0]["figures"])
    path = tmp_path / "recipe.yaml"
    path.write_text(own.model_dump_json())
    told = json.loads(bipdeploy_here("sweep", path, "--out", found.folder, "--criteria", "flap",
                                     "--json").stdout)
    assert (told["ran"], told["reused"], len(told["trials"])) == (0, 2, 2)


@on_ray
def test_trials_over_the_limit_are_stopped_before_they_are_exported_and_evaluated(swept, tmp_path):
    own, found = swept
    rough = {t["name"]: t["rough"]["repaired"] for t in found.data["trials"]
             if t["label"].endswith("flap")}
    limit = sum(rough.values()) / 2
    limited = own.model_copy(update={"sweep": own.sweep.model_copy(update={
        "criteria": ["flap"], "max_perplexity_ratio": limit})})
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(limited.model_dump_json())
    done = bipdeploy_here("sweep", path, "--out", out)
    assert done.returncode == 0, done.stderr
    data = artifacts.read_json(out / command.DATA)
    for trial in data["trials"]:
        folder = out / "trials" / trial["name"]
        assert trial["rough"]["repaired"] == rough[trial["name"]]
        if rough[trial["name"]] > limit:
            assert (trial["state"], trial["after"]) == ("stopped", "recover")
            assert not (folder / "export").exists() and not (folder / "evaluate").exists()
    stopped = [t["label"] for t in data["trials"] if t["state"] == "stopped"]
    assert stopped
    assert all(f"{label} " in done.stdout for label in stopped)
    assert "is over" in done.stdout
    again = api.sweep(limited, out)
    assert again.ran == 0


@on_ray
def test_an_address_that_cannot_be_reached_is_refused(tiny, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(tiny, tmp_path, {"ratios": [0.3, 0.5]}).model_dump_json())
    for address, words in (("127.0.0.1:1", "cannot be reached"), ("ray", "neither HOST:PORT")):
        refused(bipdeploy_here("sweep", path, "--out", tmp_path / "out", "--address", address), 2,
                "sweep.engine.address", words)
    assert list((tmp_path / "out").rglob("manifest.json")) == []
