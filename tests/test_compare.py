"""Comparisons: what is compared, that shared work changes nothing, records, tables, the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from math import exp, log

import pytest
import torch

from bipdeploy import api
from bipdeploy.comparing import cells, command, plot, records, results
from bipdeploy.errors import InputError, RecipeError
from bipdeploy.model.blocks import BlockWalker
from bipdeploy.pruning.depth import droppable
from bipdeploy.recipe import file as recipe_file
from bipdeploy.recipe.compare import CompareSection
from bipdeploy.recipe.methods import Method, method
from bipdeploy.recipe.names import CRITERIA, LAYERS_COMPARED, REPAIRS_COMPARED
from bipdeploy.recipe.prune import PruneSection
from bipdeploy.recipe.score import ScoreSection
from bipdeploy.running import artifacts
from bipdeploy.stages.score import score_blocks, score_together
from tests.running import ENVIRONMENT, RECIPES, ROOT, SCRIPT, bipdeploy, bipdeploy_here
from tests.sliced import architecture_of, short_calibration, token_windows


def recipe(model, folder, compare: dict | None = None, settings: list[str] | None = None):
    """A recipe that compares on a tiny model with little text."""
    text = folder / "test.txt"
    text.write_text(" ".join(f"word{i % 97} of line {i}" for i in range(600)))
    return recipe_file.build(
        {"name": "x", "model": {"id": str(model)}, "prune": {"ratio": 0.5, "round_to": 8,
         "search": {"points": 3, "windows": 4}},
         "evaluate": {"perplexity": {"data": str(text), "windows": [32], "max_tokens": 512}},
         "compare": {"methods": ["llm_bip"], "ratios": [0.3], "seeds": [0],
                     "repairs": ["none", "refit"], **(compare or {})}},
        "test", [*short_calibration(folder), *(settings or [])])


def test_every_fault_of_the_section_is_reported_at_once_with_what_was_meant():
    with pytest.raises(RecipeError) as raised:
        recipe_file.build({"name": "x", "model": {"id": "builtin:pico"}, "prune": {"ratio": 0.3},
                           "compare": {"criteria": ["flip", "llm_bip:exact"],
                                       "layers": ["serched"], "methods": ["flap@globl"],
                                       "ratios": [1.5], "repairs": ["refitt"], "seeds": [-1],
                                       "also": {"flap": ["none", "bais"]}}}, "r")
    faults = "\n".join(raised.value.faults)
    for words in ("compare.criteria: no criterion is called 'flip' (did you mean 'flap'?)",
                  "'llm_bip:exact'", "'serched' (did you mean 'searched'?)",
                  "compare.methods: no layers are called 'globl' (did you mean 'global'?)",
                  "compare.ratios.0: 1.5", "'refitt' (did you mean 'refit'?)",
                  "compare.seeds.0: -1", "'bais' (did you mean 'bias'?)"):
        assert words in faults


def test_criteria_and_layers_make_the_product_and_single_methods_come_after():
    section = CompareSection(criteria=["llm_bip", "flap"], layers=["uniform", "global"],
                             methods=["flap", "llm_bip:measured@depth:ffn"], repairs=["none"],
                             also={"flap": ["refit", "none"], "random@global": ["bias"]})
    assert {str(m): own for m, own in section.repairs_of("bound").items()} == {
        "llm_bip:bound": ["none"], "llm_bip:bound@global": ["none"],
        "flap": ["none", "refit"], "flap@global": ["none"],
        "llm_bip:measured@depth:ffn": ["none"], "random@global": ["bias"]}


def test_without_names_all_criteria_are_compared():
    found = CompareSection().repairs_of("measured")
    assert [m.criterion for m in found] == list(CRITERIA)
    assert next(iter(found)) == Method("llm_bip", "measured")


@pytest.mark.parametrize("name", ["flap", "flap@global", "llm_bip:bound@depth:blocks"])
def test_a_method_is_read_as_it_is_written(name):
    assert str(method(name)) == name


@pytest.mark.parametrize(("part", "ratio", "count"), [("blocks", 0.4, 1), ("ffn", 0.3, 1)])
def test_parts_are_dropped_as_far_as_the_ratio_allows(tiny, part, ratio, count):
    arch = architecture_of(tiny)
    assert droppable(arch, PruneSection(ratio=ratio), part, ratio) == count


def test_a_part_that_is_more_than_the_ratio_is_refused(tiny, tmp_path):
    with pytest.raises(InputError, match=r"depth:blocks at ratio 0\.2 drops nothing"):
        cells.plan(recipe(tiny, tmp_path, {"methods": ["flap@depth:blocks"], "ratios": [0.2]}))


def test_a_ratio_that_cannot_be_met_is_refused_before_anything_is_measured(tiny, tmp_path):
    with pytest.raises(InputError, match=r"prune.ratio: 0.99"):
        api.compare(recipe(tiny, tmp_path, {"ratios": [0.3, 0.99]}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scoring_together_gives_each_criterion_what_it_gets_alone(variant, tmp_path):
    asked = [ScoreSection(criterion=name) for name in CRITERIA]
    asked.append(ScoreSection(criterion="llm_bip", propagation="measured"))
    windows = [token_windows(2, 16), token_windows(2, 16, seed=1)]
    own = recipe(variant, tmp_path)
    walker = BlockWalker(variant, own.model)
    together = score_together(walker, windows, asked, own.seed)
    for section, found in zip(asked, together, strict=True):
        alone = score_blocks(walker, windows, own.model_copy(update={"score": section}))
        assert all(torch.equal(a.heads, b.heads) and torch.equal(a.ffn, b.ffn)
                   for a, b in zip(found.scores, alone.scores, strict=True))
        assert found.agreement == alone.agreement


@pytest.mark.parametrize(("method", "rates"), [("lora", (0.003, 5e-5)), ("full", (1e-4, 0.003))])
def test_a_learning_rate_holds_for_the_recipe_s_own_way_of_training(tiny, tmp_path, method, rates):
    wanted = cells.plan(recipe(tiny, tmp_path, {"repairs": ["refit+lora", "refit+distil"]}, [
        f"tune.method={method}", "tune.learning_rate=0.003", "tune.distillation.weight=0.25"]))
    made = [cells.recipe_of(wanted.recipe, wanted.arch, cell).tune for cell in wanted.cells[:2]]
    assert [(t.enabled, t.method) for t in made] == [(True, "lora"), (True, "full")]
    assert tuple(t.rate for t in made) == rates
    assert [t.kl for t in made] == ([0.25, 1.0] if method == "lora" else [0.0, 0.25])


def test_a_key_changes_with_all_that_the_cell_depends_on_and_with_nothing_else(tiny, tmp_path):
    def keys(*settings: str, **compare) -> dict[str, str]:
        wanted = cells.plan(recipe(tiny, tmp_path, {"repairs": list(REPAIRS_COMPARED), **compare},
                                   ["recover.refit.ridge=0.01", *settings]))
        return {c.repair: cells.key(wanted, c) for c in wanted.cells}

    base = keys()
    assert len(set(base.values())) == len(REPAIRS_COMPARED)
    for change in ("calibration.samples=8", "prune.round_to=4", "prune.protect.first=1",
                   "evaluate.perplexity.windows=[16]", "model.dtype=bfloat16", "compare.seeds=[3]",
                   "compare.ratios=[0.4]", "compare.methods=[flap]"):
        assert not set(base.values()) & set(keys(change).values()), change
    ridge = keys("recover.refit.ridge=0.1")
    assert {r for r in base if base[r] != ridge[r]} == {
        "refit", "reselect", "refit+lora", "reselect+lora", "refit+distil", "reselect+distil"}
    rank = keys("tune.rank=4")
    assert {r for r in base if base[r] != rank[r]} == {
        "lora", "refit+lora", "reselect+lora"}
    hidden = keys("tune.distillation.hidden=0.5")
    assert {r for r in base if base[r] != hidden[r]} == {
        r for r in base if "lora" in r or "distil" in r}
    for same in ("name=y", "prune.ratio=0.2", "recover.method=bias", "bench.torch.batch=7",
                 "export.onnx.style=std", "score.criterion=flap", "tune.enabled=true",
                 "calibration.spill=true"):
        assert keys(same) == base, same
    searched = keys(methods=["llm_bip@searched"])
    assert searched != keys("recover.method=bias", methods=["llm_bip@searched"])
    asked = recipe(tiny, tmp_path)
    before = cells.plan(asked)
    (tmp_path / "words.txt").write_text("another calibration text " * 3000)
    assert cells.key(before, before.cells[0]) != cells.key(cells.plan(asked), before.cells[0])


def test_a_line_that_a_kill_cut_off_is_passed_over_and_ended(tmp_path):
    records.append(tmp_path, {"n": 1})
    with (tmp_path / records.RECORDS).open("a") as file:
        file.write('{"n": 2, "cut')
    records.append(tmp_path, {"n": 3})
    assert [r["n"] for r in records.read(tmp_path)] == [1, 3]


def test_records_of_writers_at_once_are_all_there(tmp_path):
    def write(first: int) -> None:
        for n in range(first, first + 20):
            records.append(tmp_path, {"n": n, "filler": "x" * 5000})

    writers = [threading.Thread(target=write, args=(first,)) for first in (0, 20, 40, 60)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(r["n"] for r in records.read(tmp_path)) == list(range(80))


def test_only_the_work_of_processes_that_are_gone_is_removed(tmp_path):
    left = tmp_path / ".work-left"
    left.mkdir()
    (left / "lock").touch()
    with records.workplace(tmp_path) as work:
        records.sweep(tmp_path)
        assert work.is_dir()
        assert not left.exists()
    assert list(tmp_path.iterdir()) == []


def record(method: str, repair: str, seed: int, perplexity: float) -> dict:
    return {"method": method, "ratio": 0.3, "repair": repair, "seed": seed, "removed": 0.3,
            "perplexity": {"t": {"32": {"perplexity": perplexity, "nats": log(perplexity)}}}}


DENSE = {"perplexity": {"t": {"32": {"perplexity": 10.0, "nats": log(10)}}}}


def test_the_summary_is_what_its_words_say():
    found = results.summarise([
        record("a", "none", 0, 20), record("a", "none", 1, 80), record("a", "refit", 0, 20),
        record("a", "refit", 1, 20), record("b", "refit", 1, 40)], DENSE)
    by = {(s["method"], s["repair"]): s for s in found}
    assert by["a", "none"]["perplexity"] == 50
    assert by["a", "none"]["spread"] == 30
    assert by["a", "none"]["log_loss"] == pytest.approx((log(2) + log(8)) / 2)
    assert by["a", "refit"]["repaired"] == pytest.approx(1 - 2 * log(2) / (log(2) + log(8)))
    assert by["b", "refit"]["cut"] == {"a": pytest.approx(1 - log(4) / log(2))}
    assert by["a", "refit"]["cut"] == {"b": pytest.approx(1 - log(2) / log(4))}
    assert by["b", "refit"]["repaired"] is None
    assert results.table(found, [0.3]) == [
        ["method", "30%, none", "30%, refit"], ["a", "50.00 ± 30.00", "20.00 ± 0.00"],
        ["b", "–", "40.00"]]


@pytest.mark.parametrize(("value", "shown"), [(9.876, "9.88"), (123.45, "123.5"),
                                              (2702.05, "2702"), (exp(80), "5.5e+34")])
def test_perplexities_are_shown_with_about_four_digits(value, shown):
    assert results.shown(value) == shown


def test_a_plot_is_drawn_of_one_seed_and_of_figures_far_apart():
    summary = results.summarise([record("a", "none", 0, 1e6), record("b", "bias", 0, 11)], DENSE)
    assert plot.draw(summary, 10.0).startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def compared(tiny, tmp_path_factory):
    """A comparison of four spreads on a tiny model, with its recipe."""
    folder = tmp_path_factory.mktemp("compared")
    own = recipe(tiny, folder, {"methods": ["llm_bip", "llm_bip:measured@searched", "flap@global",
                                            "taylor@depth:ffn"],
                                "repairs": ["none", "bias", "refit"]})
    return own, api.compare(own, folder / "out")


def test_a_cell_is_what_the_stages_give_one_by_one(compared, tiny, tmp_path):
    own, found = compared
    settings = [f"{name}={json.dumps(value)}" for name, value in {
        "calibration": own.calibration.model_dump(), "model.device": "cpu", "prune.round_to": 8,
        "prune.search": own.prune.search.model_dump(), "score.propagation": "measured",
        "prune.layers": "searched",
        "evaluate.perplexity": own.evaluate.perplexity.model_dump()}.items()]
    scores = api.score(str(tiny), tmp_path / "scores", settings)
    pruned = api.prune(str(tiny), scores, tmp_path / "pruned", 0.3, settings)
    repaired = api.recover(str(tiny), pruned, tmp_path / "repaired", settings)
    figures = artifacts.figures([api.evaluate(str(tiny), repaired, tmp_path / "figures", settings)])
    cell = next(r for r in found.data["records"] if (r["method"], r["repair"]) == (
        "llm_bip:measured@searched", "refit"))
    text = own.evaluate.perplexity.data
    assert cell["perplexity"][text]["32"]["perplexity"] == pytest.approx(
        figures["perplexity.pruned"], rel=1e-6)
    assert found.data["dense"]["perplexity"][text]["32"]["perplexity"] == pytest.approx(
        figures["perplexity.dense"], rel=1e-6)
    assert cell["removed"] == pytest.approx(1 - artifacts.figures([pruned])[
        "block_parameters.ratio"])
    costs = {(r["method"], r["repair"]): set(r["costs"]) for r in found.data["records"]}
    assert costs["llm_bip:measured@searched", "refit"] == {"curves", "prune", "recover"}
    assert all(("recover" in stages) == (repair != "none") and "prune" in stages
               for (_, repair), stages in costs.items())
    assert all(set(cost) == {"seconds", "peak_memory_bytes"} and cost["seconds"] > 0
               for r in found.data["records"] for cost in r["costs"].values())


def test_text_by_rule_is_the_same_for_all_cells_and_as_good_as_its_number(tiny, tmp_path):
    def planned(*settings: str) -> cells.Plan:
        return cells.plan(recipe(tiny, tmp_path, {"methods": ["flap"], "ratios": [0.3, 0.5],
                                                  "repairs": ["none", "bias", "refit"]},
                                 list(settings)))

    ruled = planned("calibration.samples=null")
    count = ruled.recipe.calibration.windows
    assert count == -(-12 * ruled.arch.widest // ruled.recipe.calibration.tokens)
    assert {cells.recipe_of(ruled.recipe, ruled.arch, cell).calibration.windows
            for cell in ruled.cells} == {count}
    given, other = (planned(f"calibration.samples={n}") for n in (count, count + 1))
    keys = [[cells.key(wanted, cell) for cell in wanted.cells] for wanted in (ruled, given, other)]
    assert keys[0] == keys[1] and not set(keys[0]) & set(keys[2])


def test_every_cell_is_there_with_one_budget_and_nothing_is_left_behind(compared, tiny):
    own, found = compared
    assert found.data["not_run"] == []
    assert (found.measured, found.reused, len(found.data["summary"])) == (12, 0, 12)
    arch = architecture_of(tiny)
    unit = 8 * 3 * arch.channel_parameters() / sum(map(arch.block_parameters, range(3)))
    assert all(abs(r["removed"] - 0.3) <= unit for r in found.data["records"]
               if r["repair"] != "bias")  # biases are parameters too
    names = {p.name.split("-")[0] for p in found.folder.iterdir()}
    assert names == {"dense", records.RECORDS, command.DATA, command.TABLE, command.PAGE,
                     command.PICTURE}
    assert found.data["test"][own.evaluate.perplexity.data]["tokens"] == 512


def test_what_is_recorded_is_reused_and_a_changed_recipe_is_not(compared):
    own, found = compared
    again = api.compare(own, found.folder)
    assert (again.measured, again.reused) == (0, 12)
    assert again.data["summary"] == found.data["summary"]
    less = own.model_copy(update={"compare": CompareSection(
        methods=["llm_bip"], ratios=[0.3], seeds=[0], repairs=["none", "refit"])})
    changed = recipe_file.build({**less.model_dump(mode="json"),
                                 "recover": {"refit": {"ridge": 0.5}}}, "test")
    other = api.compare(changed, found.folder)
    assert (other.measured, other.reused) == (1, 1)  # `none` has no ridge
    assert len(api.compare(less, found.folder).data["summary"]) == 12


def test_a_record_of_what_the_model_does_not_allow_is_left_out(tmp_path):
    wanted = cells.plan(recipe("builtin:pico", tmp_path))
    held = [{"seed": c.seed, "method": str(c.method), "ratio": c.ratio, "repair": c.repair,
             "key": cells.key(wanted, c)} for c in wanted.cells]
    old = {**held[0], "method": "flap@depth:blocks", "ratio": 0.01}  # a block is more than that
    assert cells.current(wanted, [old, *held]) == held


def test_a_method_that_misses_the_budget_is_not_run_and_says_why(tiny, tmp_path):
    found = api.compare(recipe(tiny, tmp_path, {"repairs": ["none"], "ratios": [0.2]},
                               ["prune.ffn=false"]), tmp_path / "out")
    assert found.data["records"] == []
    [about] = found.data["not_run"]
    assert about["cell"] == "seed 0, llm_bip:bound at 20%, none"
    assert "more than one rounding unit" in about["why"]
    assert "Not run" in (tmp_path / "out" / command.PAGE).read_text()


@pytest.mark.parametrize("recipe_path", [RECIPES / "compare-pico.yaml"])
def test_the_shipped_recipe_can_be_compared(recipe_path):
    wanted = cells.plan(recipe_file.load(recipe_path))
    assert {c.method.layers for c in wanted.cells} == set(LAYERS_COMPARED)
    assert {c.method.criterion for c in wanted.cells} == set(CRITERIA)
    assert len({cells.key(wanted, c) for c in wanted.cells}) == len(wanted.cells)


@pytest.mark.slow
def test_the_command_prints_a_table_that_fits_and_refuses_what_it_does_not_know(tmp_path, tiny):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(tiny, tmp_path).model_dump_json())
    done = bipdeploy_here("compare", path, "--out", tmp_path / "out", "--criteria",
                          "llm_bip:measured,random", "--ratios", "0.2,0.3,0.4", "--repairs",
                          "none,bias,refit", "--seeds", "0,1")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 120
    assert sum(line.startswith("llm_bip:measured") for line in lines) == 3  # a table per ratio
    assert "…" not in done.stdout
    assert "measured 36, reused 0" in done.stdout
    done = bipdeploy_here("compare", path, "--out", tmp_path / "out", "--methods",
                          "random", "--seeds", "1", "--ratios", "0.4", "--json")
    told = json.loads(done.stdout)
    assert (told["measured"], told["reused"], len(told["summary"])) == (0, 2, 18)
    refused = bipdeploy_here("compare", path, "--out", tmp_path / "out", "--criteria", "flip",
                             "--ratios", "half")
    assert refused.returncode == 2
    assert "did you mean 'flap'" in refused.stderr
    assert "compare.ratios.0" in refused.stderr


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(tiny, tmp_path):
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(recipe(tiny, tmp_path, {"methods": ["flap", "taylor", "magnitude"],
                                            "seeds": [0, 1]}).model_dump_json())
    running = subprocess.Popen([SCRIPT, "compare", str(path), "--out", str(out)], cwd=ROOT,
                               env={**os.environ, **ENVIRONMENT}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while running.poll() is None and len(records.read(out)) < 3:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    before = (out / records.RECORDS).read_text()
    kept = len(records.read(out))
    assert 3 <= kept < 12
    told = json.loads(bipdeploy("compare", path, "--out", out, "--json").stdout)
    assert (told["measured"], told["reused"]) == (12 - kept, kept)
    assert (out / records.RECORDS).read_text().startswith(before[:before.rindex("\n")])
    assert not list(out.glob(".work-*"))


@pytest.mark.slow
def test_paper_tables_never_show_a_published_figure_as_ours(tmp_path):
    made = subprocess.run(
        [sys.executable, "benchmarks/paper_tables.py", "--model", "builtin:pico",
         "huggyllama/llama-7b", "--data", "builtin:pydocs", "wikitext2", "--tasks",
         "builtin:pydocs_choice", "llm_bip_7", "--limit", "8", "--ratios", "0.3", "--criteria",
         "wanda_sp", "--set", "prune.round_to=8", "--set", "evaluate.perplexity.max_tokens=1024",
         "--set", "calibration.samples=8", "--set", "tune.steps=2", "--set",
         "tune.batch=4", "--set", "tune.accumulation=1", "--set", "tune.validation.windows=4",
         "--repairs", "none", "refit", "refit+lora", "--out", str(tmp_path)], cwd=ROOT,
        capture_output=True, text=True, check=False,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)})
    assert made.returncode == 0, made.stderr
    found = artifacts.read_json(tmp_path / "paper_tables.json")
    pico, llama = found["models"]
    assert (pico["run"], llama["run"]) == (True, False)
    assert set(pico["not_run"]) >= {"wikitext2", "llm_bip_7"}
    assert "hub" in llama["not_run"]["huggyllama/llama-7b"]
    ours = {t["metric"]: t["rows"] for t in pico["tables"]}
    assert all(row["ours"][0] > 1 for row in ours["builtin:pydocs.128"]
               if row["published_method"] != "LLM-Pruner, LoRA")
    assert all(row["ours"] == [None] for metric in ("wikitext2.128", "accuracy.llm_bip_7")
               for row in ours[metric])
    theirs = {t["metric"]: t["rows"] for t in llama["tables"]}["wikitext2.128"]
    assert all(row["ours"] == [None] for row in theirs)
    assert [row["published"] for row in theirs if row["published_method"] == "Wanda-sp"] == [
        [38.88]]
    line = next(line for line in (tmp_path / "paper_tables.md").read_text().splitlines()
                if "38.88" in line)
    assert line == "| wanda_sp | none | not run | Wanda-sp | 38.88 |"
