"""`bipdeploy plan`: the widths and sizes that a run then makes, and what these divide by."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from bipdeploy import api
from bipdeploy.errors import InputError
from bipdeploy.model import sources
from bipdeploy.model.families import BlockWidths, architecture
from bipdeploy.pipeline.keys import stage_keys
from bipdeploy.planning import footprint, plan
from bipdeploy.planning.gpus import GPUS
from bipdeploy.planning.resolved import of_config, resolved_at
from bipdeploy.pruning.allocation import global_widths
from bipdeploy.pruning.choices import possible_widths
from bipdeploy.pruning.divisibility import faults, group_faults
from bipdeploy.recipe import file as recipe_file
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.running import artifacts
from bipdeploy.stages.table import STAGES
from tests.running import RECIPES, SMOKE, bipdeploy, bipdeploy_here, message, python, refused
from tests.test_allocation import ARCHITECTURES, PARALLEL, draw_scores, section
from tests.tiny import PICO

SIZES = ("parameters", "block_parameters", "weights_bytes", "kv_bytes_per_token")


def planned(runs: Path, *overrides: str) -> plan.Plan:
    return api.plan(recipe_file.load(SMOKE, list(overrides)), runs=runs)


def plan_here(runs: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    settings = [part for override in overrides for part in ("--set", override)]
    return bipdeploy_here("plan", SMOKE, "--runs", runs, *settings)


def made_by(folder: Path) -> tuple[BlockWidths, ...]:
    """The widths that a prune stage wrote."""
    return tuple(BlockWidths(b["heads"], b["kv_heads"], b["intermediate"])
                 for b in artifacts.read_json(folder / "kept.json")["blocks"])


def sizes_in(folder: Path) -> dict[str, float]:
    return {name: value for name, value in artifacts.figures([folder]).items()
            if name.rpartition(".")[0] in SIZES}


def verdicts(shown: plan.Plan) -> dict[str, bool | None]:
    return {v.requirement: v.divides for v in shown.verdicts}


def config_only(folder: Path, **changes: object) -> Path:
    """A model folder that holds nothing but the built-in model's config, changed."""
    folder.mkdir()
    config = json.loads((PICO / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.fixture(scope="module")
def pruned_globally(smoke, tmp_path_factory) -> Path:
    """A runs folder with the smoke recipe pruned by `layers: global`."""
    runs = tmp_path_factory.mktemp("global")
    shutil.copytree(smoke.folder / "score", runs / "smoke" / "score")
    assert api.run(SMOKE, ["prune.layers=global"], runs, until="prune").ran == ["curves", "prune"]
    return runs


# Uniform widths

def test_uniform_widths_and_sizes_are_those_that_a_run_makes(smoke, tmp_path):
    shown = planned(tmp_path)
    assert shown.known == "exact"
    assert shown.pruned == made_by(smoke.folder / "prune")
    assert shown.figures == sizes_in(smoke.folder / "prune")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("overrides", [
    ["hardware.tensor_parallel=2"], ["prune.protect={first: 1, last: 1}", "prune.round_to=16"],
    ["hardware.tensor_parallel=4", "prune.ratio=0.2"], ["prune.heads=false", "prune.ratio=0.4"]])
def test_the_prune_stage_makes_what_was_planned(smoke, tmp_path, overrides):
    shutil.copytree(smoke.folder / "score", tmp_path / "smoke" / "score")
    shown = planned(tmp_path, *overrides)
    assert api.run(SMOKE, overrides, tmp_path, until="prune").ran == ["curves", "prune"]
    assert shown.pruned == made_by(tmp_path / "smoke" / "prune")
    assert shown.figures == sizes_in(tmp_path / "smoke" / "prune")
    assert faults(shown.pruned, shown.tensor_parallel) == []


def test_a_plan_needs_nothing_but_the_config(tmp_path):
    model = config_only(tmp_path / "model")
    shown, whole = planned(tmp_path, f"model.id={model}"), planned(tmp_path)
    assert (shown.pruned, shown.figures) == (whole.pruned, whole.figures)


def test_only_the_config_of_a_hub_model_is_fetched(tmp_path, monkeypatch):
    asked = {}

    def fetch(model, revision=None, allow_patterns=None):
        asked[model] = allow_patterns
        return str(PICO)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert planned(tmp_path, "model.id=org/name").pruned == planned(tmp_path).pruned
    assert asked == {"org/name": ["config.json"]}


def test_a_plan_needs_none_of_the_libraries_that_a_run_needs(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    settings = ["evaluate.zero_shot.enabled=true", "export.onnx.enabled=true"]
    assert planned(tmp_path, *settings).pruned == planned(tmp_path).pruned
    with pytest.raises(InputError, match="is not installed"):
        api.run(SMOKE, settings, tmp_path)


def test_a_run_fetches_no_weights_of_a_model_that_it_refuses(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda *_, allow_patterns, **__: asked.append(allow_patterns) or str(PICO))
    with pytest.raises(InputError, match=r"^calibration\.tokens: 9999"):
        api.run(SMOKE, ["model.id=org/name", "calibration.tokens=9999"], tmp_path)
    assert asked == [["config.json"]]


def test_a_hub_cache_without_weights_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda *_, **__: str(config_only(tmp_path / "cached")))
    with pytest.raises(InputError, match=r"^model\.id: org/name has no safetensors here"):
        sources.model_folder("org/name")


# Global widths

def test_global_widths_are_not_known_before_a_run(tmp_path):
    shown, uniform = planned(tmp_path, "prune.layers=global"), planned(tmp_path)
    assert shown.known == "budget"
    assert (shown.pruned, shown.figures) == (uniform.pruned, uniform.figures)
    assert set(verdicts(shown).values()) == {None}


def test_global_widths_are_certain_to_divide_by_the_recipe_s_tensor_parallel(tmp_path):
    shown = planned(tmp_path, "prune.layers=global", "prune.ratio=0.2",
                    "hardware.tensor_parallel=4")
    assert verdicts(shown) == {
        "tensor parallel 2": True, "tensor parallel 4": True, "tensor parallel 8": None,
        "quantisation groups of 64, tensor parallel 4": None,
        "tensor-core multiples of 64, tensor parallel 4": None,
        "quantisation groups of 128, tensor parallel 4": None,
        "tensor-core multiples of 128, tensor parallel 4": None}


def test_what_no_width_can_mend_is_known_before_scoring(tmp_path):
    model = config_only(tmp_path / "model", hidden_size=192)
    shown = planned(tmp_path, f"model.id={model}", "prune.layers=global")
    (verdict,) = [v for v in shown.verdicts if v.requirement == "quantisation groups of 128"]
    assert (verdict.divides, verdict.faults) == (False, ("hidden size 192",))


def test_global_widths_are_those_of_a_finished_run(pruned_globally):
    shown = planned(pruned_globally, "prune.layers=global")
    assert shown.known == "run"
    assert shown.pruned == made_by(pruned_globally / "smoke" / "prune")
    assert len(set(shown.pruned)) > 1
    assert shown.figures == sizes_in(pruned_globally / "smoke" / "prune")
    assert None not in verdicts(shown).values()


@pytest.mark.parametrize("override", ["prune.ratio=0.35", "seed=1", "hardware.tensor_parallel=2"])
def test_a_run_of_another_recipe_is_not_taken(pruned_globally, override):
    assert planned(pruned_globally, "prune.layers=global", override).known == "budget"


def test_a_damaged_run_is_not_taken(pruned_globally, tmp_path):
    runs = shutil.copytree(pruned_globally, tmp_path / "runs")
    (runs / "smoke" / "prune" / "kept.json").write_text("{")
    assert planned(runs, "prune.layers=global").known == "budget"


@pytest.mark.parametrize("parallel", [1, 2, 4])
@pytest.mark.parametrize("name", ["mha", "gqa", "repeated"])
def test_what_the_possible_widths_divide_by_global_widths_divide_by(name, parallel):
    arch = PARALLEL[name]
    for ratio, unit, first in ((0.1, 64, 0), (0.3, 16, 1), (0.5, 8, 0)):
        asked = section(ratio, "global", round_to=unit, first=first)
        possible = possible_widths(arch, asked, tensor_parallel=parallel)
        assert faults(possible, parallel) == []
        widths = global_widths(arch, asked, draw_scores(arch), comparable=True,
                               tensor_parallel=parallel)
        for number in (2, 3, 4, 8, 16):
            assert faults(possible, number) or not faults(widths, number)
        for group in (16, 32, 64):
            assert group_faults(arch, possible, group) or not group_faults(arch, widths, group)


# Verdicts and what is shown

def test_three_kv_heads_break_tensor_parallel_two(tmp_path):
    model = config_only(tmp_path / "model", num_attention_heads=12, num_key_value_heads=6)
    done = plan_here(tmp_path, f"model.id={model}", "prune.ratio=0.5")
    assert done.returncode == 0, done.stderr
    assert "blocks 0-6: 6 heads, 3 KV heads" in done.stdout
    lines = {line.partition("  ")[0]: line.partition("  ")[2].strip()
             for line in done.stdout.splitlines()}
    assert lines["tensor parallel 2"] == ("breaks: block 0: 3 KV heads, block 1: 3 KV heads "
                                          "(7 in all)")
    assert lines["tensor parallel 4"].startswith("breaks: block 0: 6 query heads, ")


def test_the_recipe_s_own_tensor_parallel_is_judged_too(tmp_path):
    model = config_only(tmp_path / "model", num_attention_heads=12, num_key_value_heads=12)
    shown = planned(tmp_path, f"model.id={model}", "hardware.tensor_parallel=3")
    assert verdicts(shown)["tensor parallel 3"] is True


def test_the_screen_shows_sizes_widths_and_verdicts(tmp_path):
    done = plan_here(tmp_path, "hardware.tensor_parallel=2", "prune.protect.last=2")
    assert (done.returncode, done.stderr) == (0, "")
    table, widths, lines, speeds, stages, last = done.stdout.strip("\n").split("\n\n")
    assert table.splitlines()[0].split() == ["dense", "pruned", "pruned", "/", "dense"]
    for label in ("Parameters", "of which in blocks", "Weights, 16 bit", "KV cache/token, 16 bit",
                  "On disk", "KV cache, 1 x 36 tokens", "FLOPs/token, prefill",
                  "FLOPs/token, decode"):
        assert label in table
    assert speeds.startswith("expected speed-up: ") and "roofline" not in speeds
    assert [line.split()[0] for line in stages.splitlines()[1:]] == list(STAGES)
    assert "this CPU" in last and last.splitlines()[-1].startswith("disk ")
    dense, first, last = widths.splitlines()
    assert dense == "dense    blocks 0-6: 4 heads, 4 KV heads, 384 channels"
    assert first.startswith("pruned   blocks 0-4: 2 heads, 2 KV heads, ")
    assert last == "         blocks 5-6: 4 heads, 4 KV heads, 384 channels"
    assert lines.splitlines()[0].split() == ["tensor", "parallel", "2", "divides"]


def test_the_screen_says_that_global_widths_depend_on_scores(tmp_path):
    shown = plan_here(tmp_path, "prune.layers=global").stdout
    assert "known once score and prune have run" in shown
    assert "\nuniform  blocks 0-6: 3 heads" in shown and "\npruned  " not in shown
    assert "not known before scoring" in shown


def test_text_too_little_to_be_fitted_to_is_said_with_both_numbers(tmp_path):
    """1,792 tokens for 384 channels; 1,920 are enough not to be warned about."""
    assert resolved_at(recipe_file.load(SMOKE, ["calibration.samples=30"]), PICO).text_note is None
    little = "calibration.samples=28"
    said = ("calibration: 1,792 tokens are 4.7 for each of the 384 inputs of the widest "
            "projection, and a refit to fewer than 5 fits noise; 12 take 72 "
            "windows, and without calibration.samples and calibration.tokens_per_channel as many "
            "are drawn")
    assert planned(tmp_path, little).note == said
    assert plan_here(tmp_path, little).stderr == f"note  {said}\n"
    checked = bipdeploy_here("check", SMOKE, "--set", little)
    assert (checked.returncode, checked.stderr) == (0, f"note  {SMOKE}: {said}\n")
    assert planned(tmp_path, little, "recover.method=none").note is None
    ran = api.run(SMOKE, [little], tmp_path, until="score")
    assert said in artifacts.read_json(ran.folder / "score" / "manifest.json")["notes"]


RULE = ("calibration.samples=null",)  # the smoke recipe's windows have 64 tokens


@pytest.mark.parametrize(("settings", "windows"), [
    (RULE, 72), ((*RULE, "calibration.tokens_per_channel=3"), 18),
    ((*RULE, "calibration.tokens=100"), 47), ((*RULE, "calibration.tokens_per_channel=0.01"), 3)])
def test_windows_follow_from_the_widest_projection(tmp_path, settings, windows):
    """384 channels of the built-in model are wider than its 4 heads of 32."""
    recipe = recipe_file.load(SMOKE, list(settings))
    found = resolved_at(recipe, PICO)
    assert recipe.calibration.samples is None
    assert found.recipe.calibration.windows == windows
    assert planned(tmp_path, *settings).calibration["windows"] == windows


def test_wide_heads_ask_for_as_much_text_as_wide_ffns():
    shape = {**recipe_file.load(RECIPES / "llama7b-30.yaml").model.shape.config,
             "num_attention_heads": 100, "num_key_value_heads": 100, "hidden_size": 4096,
             "head_dim": 128}
    recipe = recipe_file.load(SMOKE, list(RULE))
    assert of_config(recipe, shape).recipe.calibration.windows == 12 * 12800 // 64


def test_the_number_that_a_rule_gave_costs_what_the_same_number_does(tmp_path):
    ruled, given = planned(tmp_path, *RULE), planned(tmp_path, "calibration.samples=72")
    few = planned(tmp_path, "calibration.samples=36")
    for stage in ("score", "recover"):
        assert ruled.stages[stage].memory == given.stages[stage].memory > few.stages[stage].memory
    assert ruled.text == given.text


def test_plan_and_check_show_the_text_that_a_rule_gave(tmp_path):
    said = "72 windows of 64 tokens, 12.0 for each of the 384 inputs of the widest projection"
    assert f"\ntext     {said}\n" in plan_here(tmp_path, *RULE).stdout
    checked = bipdeploy_here("check", SMOKE, "--set", *RULE)
    assert checked.stdout == f"ok  {SMOKE}\n    calibration: {said}\n"
    assert bipdeploy_here("check", SMOKE).stdout == f"ok  {SMOKE}\n"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*b-*0.yaml")), ids=lambda path: path.stem)
def test_the_large_recipes_give_text_enough_to_fit(path):
    recipe = recipe_file.load(path)
    assert recipe.model.shape
    assert of_config(recipe, recipe.model.shape.config).text_note is None


def test_runs_of_equal_blocks_are_one_line():
    arch = ARCHITECTURES["already-pruned"]
    assert plan.described((*arch.blocks, arch.blocks[-1])) == [
        "block 0: 4 heads, 4 KV heads, 96 channels", "block 1: 2 heads, 2 KV heads, 40 channels",
        "block 2: 0 heads, 0 KV heads, 64 channels", "block 3: 4 heads, 4 KV heads, 0 channels",
        "blocks 4-5: 1 head, 1 KV head, 72 channels"]


def test_the_plan_comes_as_json_on_stdout_and_nothing_else(tmp_path):
    done = bipdeploy("plan", SMOKE, "--runs", tmp_path, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    shown, made = json.loads(done.stdout), planned(tmp_path)
    assert shown["figures"] == made.figures and shown["known"] == "exact"
    assert [BlockWidths(**block) for block in shown["pruned"]] == list(made.pruned)
    assert [v["requirement"] for v in shown["verdicts"]] == list(verdicts(made))


@pytest.mark.parametrize("layers", ["uniform", "global"])
def test_a_plan_loads_no_torch(pruned_globally, layers):
    code = ("import sys; from bipdeploy.cli.commands import app\n"
            "app(['plan', *sys.argv[1:]], standalone_mode=False)\n"
            "print(sorted({'torch', 'transformers', 'safetensors', 'numpy'} & set(sys.modules)))")
    done = python(code, SMOKE, "--runs", pruned_globally, "--set", f"prune.layers={layers}",
                  "--json")
    shown, loaded = done.stdout.splitlines()
    assert json.loads(shown)["known"] == {"uniform": "exact", "global": "run"}[layers]
    assert loaded == "[]"


# Costs

def test_costs_are_counted_by_hand_on_a_llama(tmp_path):
    shown = api.plan(recipe_file.load(RECIPES / "llama7b-30.yaml", [
        "evaluate.zero_shot.enabled=false", "hardware.gpu=h200"]), runs=tmp_path)
    body = 32 * (4 * 4096 ** 2 + 3 * 4096 * 11008)
    dense = {name: values["dense"] for name, values in shown.costs.items()}
    assert dense["disk_bytes"] == 2 * (body + 2 * 32000 * 4096 + (2 * 32 + 1) * 4096)
    assert dense["kv_bytes_per_token"] == 2 * 2 * 32 * 4096
    assert dense["kv_cache_bytes"] == 256 * dense["kv_bytes_per_token"]
    assert dense["decode_flops_per_token"] == 2 * (body + 32000 * 4096) + 32 * 4 * 256 * 4096
    assert dense["prefill_flops_per_token"] == (
        2 * body + 32 * 4 * 128 * 4096 + 2 * 32000 * 4096 / 128)
    read = dense["disk_bytes"] - 2 * 32000 * 4096 + dense["kv_cache_bytes"]
    assert dense["decode_bytes_read"] == read
    bound = shown.roofline["decode"]
    assert bound["dense"] == pytest.approx(read / 4.8e12, rel=0.01)
    assert bound["dense"] / bound["pruned"] == pytest.approx(shown.speedups["memory_bound"], 0.01)
    assert shown.gpu == GPUS["H200"] and shown.machine["flops"] == 989e12


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_can_be_planned_without_network(tmp_path, path):
    recipe = recipe_file.load(path, ["evaluate.zero_shot.enabled=false"])
    shown = api.plan(recipe, runs=tmp_path)
    assert shown.source == ("config" if recipe.model.id == "builtin:pico" else "shape")
    left = shown.figures["block_parameters.ratio"]
    assert left == pytest.approx(1 - recipe.prune.ratio, abs=0.02)
    assert shown.stages.keys() == STAGES.keys()


def test_a_shape_stands_in_only_where_there_is_no_config(tmp_path, monkeypatch):
    path = RECIPES / "smollm-135m.yaml"
    shown = bipdeploy_here("plan", path, "--runs", tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "the sizes are those of model.shape" in shown.stdout
    shape = recipe_file.load(path).model.shape
    folder = tmp_path / "model"
    folder.mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    (folder / "config.json").write_text(json.dumps(shape.config))
    assert api.plan(recipe_file.load(path), runs=tmp_path).source == "config"
    (folder / "config.json").write_text(json.dumps({**shape.config, "intermediate_size": 1600}))
    refused(bipdeploy_here("plan", path, "--runs", tmp_path), 2,
            "model.shape.intermediate: 1536 is not what the model's config.json says, 1600")
    refused(bipdeploy_here("run", path, "--runs", tmp_path), 2, "model.shape.intermediate: 1536")


def test_no_stage_depends_on_what_only_a_plan_reads():
    plain = recipe_file.load(SMOKE)
    more = recipe_file.load(SMOKE, ["hardware.gpu=H100", "model.shape={model_type: llama, hidden: "
                                    "128, intermediate: 384, blocks: 7, heads: 4, kv_heads: 4, "
                                    "head_dim: 32, vocabulary: 4096, tied: true, max_positions: "
                                    "256, dtype: bfloat16}"])
    assert architecture(more.model.shape.config) == architecture(
        json.loads((PICO / "config.json").read_text()))
    first, second = (stage_keys(resolved_at(recipe, PICO)) for recipe in (plain, more))
    assert {n for n in first if first[n] != second[n]} <= {"report"}


def test_a_gpu_is_known_by_name_and_others_are_one_line(tmp_path):
    shown = bipdeploy_here("plan", SMOKE, "--runs", tmp_path, "--gpu", "rtx4090").stdout
    assert "decode on RTX 4090, at least (roofline): " in shown
    for name in ("--gpu=4090", "--set=hardware.gpu=4090"):
        assert "on RTX 4090, " in bipdeploy_here("plan", SMOKE, "--runs", tmp_path, name).stdout
    refused(bipdeploy_here("plan", SMOKE, "--gpu", "H10"), 2, "--gpu: no GPU is called 'H10'",
            "did you mean 'H100'?")
    done = bipdeploy_here("plan", SMOKE, "--set", "hardware.gpu=L40")
    assert done.returncode == 2
    assert message(done)[-1] == ("  hardware.gpu: no GPU is called 'L40' (did you mean 'L40S'?)")


# Bad input

@pytest.mark.parametrize(("override", "words"), [
    ("hardware.tensor_parallel=3", "hardware.tensor_parallel: 3 does not divide this model "
                                   "(block 0: 4 query heads); use 1, 2 or 4"),
    ("prune.ratio=0.99", "prune.ratio: 0.99 would leave a block without heads or FFN channels"),
    ("model.id=./nowhere", "model.id: there is no folder './nowhere'"),
    ("calibration.data=missing.txt", "calibration.data: there is no file 'missing.txt'")])
def test_bad_input_is_one_line(tmp_path, override, words):
    done = plan_here(tmp_path, override)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = message(done)
    assert line.startswith(f"error: {words}")


def test_a_recipe_from_python_can_be_planned(tmp_path):
    recipe = Recipe.model_validate({"name": "here", "model": {"id": "builtin:pico"},
                                    "prune": {"ratio": 0.2, "round_to": 8}})
    found = api.plan(recipe, runs=tmp_path).figures
    assert found["block_parameters.ratio"] == pytest.approx(0.8, 0.02)


def test_what_a_criterion_and_a_repair_hold_is_in_the_memory(tmp_path):
    held = {name: planned(tmp_path, "hardware.gpu=H100", *overrides).stages for name, overrides in {
        "bound": ["score.criterion=llm_bip"], "joint": ["score.criterion=llm_bip_joint"],
        "again": ["score.criterion=llm_bip", "recover.refit.reselect=true"]}.items()}
    widest = architecture(json.loads((PICO / "config.json").read_text())).blocks[0].intermediate
    assert held["joint"]["score"].memory - held["bound"]["score"].memory >= 8 * 3 * widest ** 2
    assert held["again"]["recover"].memory > held["bound"]["recover"].memory
    assert held["joint"]["score"].seconds >= held["bound"]["score"].seconds


def test_training_all_weights_is_in_the_memory_and_on_the_disk(tmp_path):
    full = ["hardware.gpu=H100", "tune.enabled=true", "tune.method=full"]

    def tuned(*overrides: str) -> footprint.Stage:
        return planned(tmp_path, *overrides).stages["tune"]

    whole, lora = tuned(*full), tuned(*full, "tune.method=lora")
    figures = planned(tmp_path, *full).figures
    kept, dense = figures["parameters.pruned"], figures["parameters.dense"]
    assert whole.memory > 16 * kept + 2 * dense
    assert whole.memory > lora.memory + 14 * kept
    assert whole.writes - lora.writes == pytest.approx(32 * kept)
    untaught = tuned(*full, "tune.distillation.weight=0")
    assert whole.memory - untaught.memory >= 2 * dense
    assert whole.seconds > untaught.seconds
    assert tuned(*full, "tune.processes=2").memory < whole.memory
    cpu = tuned("model.device=cpu", *full[1:])
    assert cpu.memory > 36 * kept + 4 * dense
