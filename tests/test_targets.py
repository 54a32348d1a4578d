"""`prune.target`: budgets are met and just met, plans equal what is made, too much is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bipdeploy import api
from bipdeploy.errors import InputError, RecipeError, StageError
from bipdeploy.model import cost
from bipdeploy.model.checkpoint import read_config
from bipdeploy.model.families import architecture
from bipdeploy.pipeline.keys import stage_keys
from bipdeploy.planning import latency
from bipdeploy.planning.latency import Curve, Phase, Table
from bipdeploy.planning.resolved import of_config, resolved_at
from bipdeploy.pruning.allocation import uniform_widths
from bipdeploy.recipe import file as recipe_file
from bipdeploy.recipe.target import parse_bytes
from bipdeploy.running import artifacts
from tests.running import SMOKE, bipdeploy_here, message, refused
from tests.sliced import short_calibration
from tests.test_cost import tensor_bytes
from tests.test_plan import made_by
from tests.tiny import PICO

CONFIG = read_config(PICO)
ARCH = architecture(CONFIG)


def planned(recipe, config):
    """The target of a recipe, and the uniform widths that meet it."""
    found = of_config(recipe, config)
    return found.target, list(found.uniform)


def asked(target: str, *more: str):
    return recipe_file.load(SMOKE, ["prune.ratio=null", f"prune.target={target}", *more])


def settings(target: str) -> list[str]:
    return ["prune.ratio=null", f"prune.target={target}"]


def table_of(recipe) -> Table:
    """Times drawn by hand: attention is dear in decoding, FFN channels in prefill."""
    def phase(head: float, channel: float) -> Phase:
        return Phase(Curve((1, 4), (head + 1e-4, 4 * head + 1e-4)),
                     Curve((96, 384), (96 * channel, 384 * channel)), 1e-3, {}, {})

    key = of_config(recipe, CONFIG).times
    assert key is not None
    return Table(key, {"prefill": phase(1e-4, 1e-5), "decode": phase(5e-4, 1e-6)}, 7, 9, 1.0, {})


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bipdeploy" / "profiles"


# Amounts and recipes

@pytest.mark.parametrize(("text", "number"), [
    ("9.0GB", 9_000_000_000), ("512MiB", 512 << 20), ("1 kib", 1024), (12345, 12345),
    ("2.5e9", 2_500_000_000), ("7B", 7)])
def test_amounts_of_memory_are_read(text, number):
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["9.0GX", "much", "-3GB", True, "1.2.3", ""])
def test_other_amounts_are_refused(text):
    with pytest.raises(ValueError, match=r"write 9\.0GB, 512MiB or bytes"):
        parse_bytes(text)


@pytest.mark.parametrize(("target", "words"), [
    ("{}", "give exactly one of parameters, flops"),
    ("{flops: 0.2, memory: 1GB}", "here are flops and memory"),
    ("{flops: 1.2}", "prune.target.flops: 1.2 is not accepted"),
    ("{decode_speedup: 0.9}", "prune.target.decode_speedup: 0.9 is not accepted"),
    ("{memory: 1e400}", "prune.target.memory: '1e400' is more memory than there is"),
    ("{memory: lots}", "prune.target.memory: 'lots' is no amount of memory"),
    ("{flop: 0.2}", "prune.target.flop: unknown field (did you mean 'flops'?)")])
def test_a_wrong_target_is_a_fault_of_the_recipe(target, words):
    with pytest.raises(RecipeError) as caught:
        asked(target)
    assert any(words in fault for fault in caught.value.faults), caught.value.faults


def test_a_ratio_and_a_target_are_one_too_many():
    with pytest.raises(RecipeError, match="ratio and target are both given"):
        recipe_file.load(SMOKE, ["prune.target={flops: 0.2}"])
    with pytest.raises(RecipeError, match="heads and ffn are both false"):
        asked("{flops: 0.2}", "prune.heads=false", "prune.ffn=false", "prune.depth.blocks=1")


# Widths

TARGETS = ["{flops: 0.3}", "{flops: 0.15, context: 250}", "{memory: 3.4MB}",
           "{memory: 3600KB, context: 200, batch: 2}", "{decode_speedup: 1.3}",
           "{prefill_speedup: 1.25, context: 64}"]


@pytest.mark.parametrize("target", TARGETS)
def test_uniform_widths_just_meet_the_budget(cache, target):
    recipe = asked(target)
    if recipe.prune.target.timed:
        latency.store(table_of(recipe))
    found, widths = planned(recipe, CONFIG)
    spent = found.cost.whole(widths)
    assert spent <= found.limit
    tried = []
    for thousandth in range(5, 700):
        section = recipe.prune.model_copy(update={"ratio": thousandth / 1000})
        tried.append(found.cost.whole(uniform_widths(ARCH, section)))
    unit = max(a - b for a, b in zip(sorted(tried, reverse=True), sorted(tried, reverse=True)[1:],
                                     strict=False))
    within = [value for value in tried if value <= found.limit]
    assert max(within) - spent <= unit
    reached = found.reached(widths)
    assert reached <= found.section.asked if found.section.kind == "memory" else (
        reached >= found.section.asked)


def test_a_share_of_parameters_is_the_ratio():
    _, widths = planned(asked("{parameters: 0.3}"), CONFIG)
    assert (None, widths) == planned(recipe_file.load(SMOKE), CONFIG)


@pytest.mark.parametrize("layers", ["uniform", "global", "adaptive"])
@pytest.mark.parametrize("target", ["{flops: 0.25}", "{memory: 3.5MB}"])
def test_the_prune_stage_meets_the_target_and_says_so(smoke, tmp_path, layers, target):
    shutil.copytree(smoke.folder / "score", tmp_path / "smoke" / "score")
    more = [*settings(target), f"prune.layers={layers}"]
    assert api.run(SMOKE, more, tmp_path, until="prune").ran == ["curves", "prune"]
    folder = tmp_path / "smoke" / "prune"
    kept, figures = artifacts.read_json(folder / "kept.json"), artifacts.figures([folder])
    record = kept["target"]
    assert figures["prune.target.reached"] == record["reached"]
    if record["kind"] == "memory":
        size = tensor_bytes(folder / "model")
        assert record["reached"] == size and 3_350_000 < size <= 3_500_000
    else:
        made = cost.flops(ARCH, 128)
        assert record["reached"] == pytest.approx(
            1 - made.whole(made_by(folder)) / made.whole(ARCH.blocks))
        assert 0.25 <= record["reached"] < 0.27
    if layers == "uniform":
        shown = api.plan(recipe_file.load(SMOKE, more), runs=tmp_path / "nowhere")
        assert shown.pruned == made_by(folder) and shown.known == "exact"
        assert shown.target == record
        assert shown.costs["disk_bytes"]["pruned"] == tensor_bytes(folder / "model")


def test_biases_that_the_repair_adds_count(tmp_path):
    recipe = asked("{memory: 3.5MB}", "recover.method=bias")
    target, widths = planned(recipe, CONFIG)
    assert target.cost.whole(ARCH.blocks) > cost.memory(ARCH, 2).whole(ARCH.blocks)
    shown = api.plan(recipe, runs=tmp_path)
    assert shown.pruned == tuple(widths)
    assert shown.costs["disk_bytes"]["pruned"] <= target.cost.whole(widths) <= 3_500_000


def test_a_repair_that_adds_biases_reruns_prune_where_bytes_are_asked_for():
    def prune(target: str, method: str) -> str:
        return stage_keys(resolved_at(asked(target, f"recover.method={method}"), PICO))["prune"]

    assert prune("{memory: 3.5MB}", "refit") != prune("{memory: 3.5MB}", "bias")
    assert prune("{flops: 0.3}", "refit") == prune("{flops: 0.3}", "bias")


def test_a_share_of_parameters_has_no_figure_that_a_gate_could_wait_for():
    gate = "gates.prune.target.reached.min=0.2"
    asked("{flops: 0.3}", gate)
    with pytest.raises(RecipeError, match=r"no enabled stage measures 'prune.target.reached'"):
        asked("{parameters: 0.3}", gate)


def test_a_search_spends_the_target_s_own_unit(tiny, tmp_path):
    base = [*short_calibration(tmp_path), "prune.layers=searched", "prune.round_to=8",
            "prune.search.points=3"]
    scores = api.score(str(tiny), tmp_path / "scores", base)
    out = api.prune(str(tiny), scores, tmp_path / "pruned", None,
                    [*base, "prune.target={flops: 0.3, context: 250}"])
    record = artifacts.read_json(out / "kept.json")["target"]
    arch = architecture(read_config(tiny))
    spent = cost.flops(arch, 250)
    share = 1 - spent.whole(made_by(out)) / spent.whole(arch.blocks)
    assert record["reached"] == pytest.approx(share)
    assert 0.3 <= share < 0.3 + 8 * 6 * 64 * 250 / spent.whole(arch.blocks) + 1e-3


# Times

def test_speeds_come_from_the_cached_table_and_change_the_key(smoke, cache, tmp_path):
    shutil.copytree(smoke.folder / "score", tmp_path / "runs" / "smoke" / "score")
    more = settings("{decode_speedup: 1.3}")
    recipe = recipe_file.load(SMOKE, more)
    without = stage_keys(resolved_at(recipe, PICO))
    assert api.plan(recipe, runs=tmp_path / "runs").known == "unmeasured"
    table = table_of(recipe)
    latency.store(table)
    shown = api.plan(recipe, runs=tmp_path / "runs")
    assert shown.known == "exact" and shown.target["profile"] == table.digest
    keys = stage_keys(resolved_at(recipe, PICO))
    assert keys["score"] == without["score"] and keys["prune"] != without["prune"]
    assert api.run(SMOKE, more, tmp_path / "runs", until="prune").ran == ["curves", "prune"]
    folder = tmp_path / "runs" / "smoke" / "prune"
    assert made_by(folder) == shown.pruned
    spent = table.phases["decode"].cost
    gain = spent.whole(ARCH.blocks) / spent.whole(made_by(folder))
    assert artifacts.figures([folder])["prune.target.reached"] == pytest.approx(gain)
    assert api.run(SMOKE, more, tmp_path / "runs", until="prune").ran == []


def test_without_a_table_a_speed_up_is_bounded_by_bytes(cache):
    recipe = asked("{decode_speedup: 1.2}")
    target, widths = planned(recipe, CONFIG)
    assert target.unit == "bytes read"
    assert target.cost.whole(ARCH.blocks) == cost.read_per_step(ARCH, 2, 1, 128)
    assert target.reached(widths) >= 1.2


# Too much, or nothing

@pytest.mark.parametrize(("target", "words"), [
    ("{flops: 0.99}", "prune.target.flops: 0.99 is more than these settings allow, at most 0."),
    ("{memory: 1MB}", "prune.target.memory: 1000000 bytes is below the "),
    ("{memory: 1GB}", "prune.target.memory: 1000000000 bytes is no less than the dense")])
def test_an_impossible_target_is_refused_before_scoring(tmp_path, target, words):
    done = bipdeploy_here("run", SMOKE, "--runs", tmp_path, "--set", "prune.ratio=null", "--set",
                          f"prune.target={target}")
    refused(done, 2, words)
    assert not (tmp_path / "smoke").exists()


@pytest.mark.parametrize("target", ["{flops: 0.99}", "{memory: 1MB}"])
def test_the_most_that_a_refusal_names_is_possible(target):
    with pytest.raises(InputError) as caught:
        planned(asked(target), CONFIG)
    kind = target.strip("{").partition(":")[0]
    words = str(caught.value).replace(";", " ").split()
    most = words[words.index("most" if kind == "flops" else "the") + 1]
    found, widths = planned(asked(f"{{{kind}: {most}}}"), CONFIG)
    assert found.cost.whole(widths) <= found.limit


def test_a_speed_that_the_times_do_not_allow_is_refused_before_scoring(cache, tmp_path):
    more = settings("{decode_speedup: 9}")
    latency.store(table_of(recipe_file.load(SMOKE, more)))
    with pytest.raises(InputError, match=r"prune.target.decode_speedup: 9 is more .* at most 3"):
        api.run(SMOKE, more, tmp_path / "runs")


def test_bytes_need_a_stated_type():
    config = {k: v for k, v in CONFIG.items() if k != "dtype"}
    with pytest.raises(InputError, match=r"prune.target.memory: config.json does not state"):
        planned(asked("{memory: 3MB}"), config)


def test_one_stage_takes_a_target_too(smoke, tmp_path):
    done = bipdeploy_here("prune", "builtin:pico", smoke.folder / "score", "--out",
                          tmp_path / "p", "--set", "prune.round_to=8",
                          "--set", "prune.target={flops: 0.3}")
    assert done.returncode == 0, done.stderr
    assert artifacts.read_json(tmp_path / "p" / "kept.json")["target"]["kind"] == "flops"


def test_one_stage_needs_a_ratio_or_a_target(smoke, tmp_path):
    done = bipdeploy_here("prune", "builtin:pico", smoke.folder / "score", "--out", tmp_path / "p")
    assert done.returncode == 2
    assert message(done)[-1] == "  prune: give ratio or target"


# The disk

def test_a_run_that_does_not_fit_on_the_disk_is_refused_at_its_start(smoke, tmp_path, monkeypatch):
    whole = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: whole._replace(free=5_000_000))
    with pytest.raises(StageError, match=r"about 0.0\d+ GB will be .* and 0.005 GB are free"):
        api.run(SMOKE, [], tmp_path)
    assert not (tmp_path / "smoke" / "score").exists()
    monkeypatch.setattr("shutil.disk_usage", lambda path: whole._replace(free=50_000))
    for stage, arguments in ((api.prune, ["builtin:pico", smoke.folder / "score"]),
                             (api.recover, ["builtin:pico", smoke.folder / "prune"]),
                             (api.export, [smoke.folder / "recover"])):
        given = {"ratio": 0.3} if stage is api.prune else {}
        with pytest.raises(StageError, match=r"5e-05 GB are free.* with --out$"):
            stage(*arguments, tmp_path / "one", **given)
        assert not (tmp_path / "one").exists()
    monkeypatch.setattr("shutil.disk_usage", lambda path: whole._replace(free=5_000_000))
    shutil.copytree(smoke.folder, tmp_path / "smoke", dirs_exist_ok=True)
    assert api.run(SMOKE, [], tmp_path).ran == []  # all is there: nothing is written
    shown = bipdeploy_here("plan", SMOKE, "--runs", tmp_path / "other").stdout
    assert "does not fit" in shown
