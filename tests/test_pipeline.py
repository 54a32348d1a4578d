"""Whole runs of recipes/smoke.yaml: what they write, what is reused, and that figures are true."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bipdeploy import api
from bipdeploy.cli import commands as cli
from bipdeploy.data import text, windows
from bipdeploy.errors import BipdeployError, InputError, StageError
from bipdeploy.measuring.perplexity import forward_of, perplexity
from bipdeploy.measuring.timing import Spread, interleaved, speedup
from bipdeploy.pipeline import pipeline
from bipdeploy.recipe import figures, tune
from bipdeploy.recipe import file as recipe_file
from bipdeploy.running import artifacts, machine
from bipdeploy.running.reporter import Silent
from bipdeploy.stages.table import STAGES, Stage
from tests.running import SMOKE, leftovers, python
from tests.tiny import PICO

NAMES = list(STAGES)


@pytest.fixture
def again(smoke, tmp_path):
    """Run the smoke recipe anew over a copy of the finished run, with overrides and options."""
    shutil.copytree(smoke.folder, tmp_path / "smoke")

    def run(*overrides: str, **options):
        return api.run(SMOKE, overrides, tmp_path, **options)

    run.folder = tmp_path / "smoke"
    return run


# What a run writes

def test_a_run_runs_every_stage_into_a_folder_of_its_own(smoke):
    assert smoke.ran == NAMES and smoke.reused == []
    assert {p.name for p in smoke.folder.iterdir()} == {*NAMES, "manifest.json"}
    assert leftovers(smoke.folder) == []


@pytest.mark.parametrize("stage", NAMES)
def test_a_stage_s_manifest_says_how_it_was_made(smoke, stage):
    manifest = artifacts.read_manifest(smoke.folder / stage)
    assert manifest["stage"] == stage and manifest["seed"] == 0
    assert set(manifest["sections"]) == set(STAGES[stage].sections)
    assert set(manifest["inputs"]) == set(STAGES[stage].needs)
    assert re.fullmatch(r"[0-9a-f]{64}", manifest["key"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", manifest["started"])
    assert 0 <= manifest["seconds"] < 300
    assert 50 << 20 < manifest["peak_memory_bytes"] < 16 << 30
    assert ("peak_gpu_memory_bytes" in manifest) <= torch.cuda.is_available()
    environment = manifest["environment"]
    assert environment["libraries"]["torch"] == torch.__version__
    assert environment["python"] and environment["code"] and environment["hardware"]["cores"] >= 1
    files = {str(p.relative_to(smoke.folder / stage)): p
             for p in (smoke.folder / stage).rglob("*") if p.is_file()}
    del files["manifest.json"]
    assert manifest["sha256"] == {name: artifacts.sha256(path) for name, path in files.items()}
    assert manifest["sizes"] == {name: path.stat().st_size for name, path in files.items()}


def test_the_run_s_manifest_holds_the_recipe_and_every_stage(smoke):
    manifest = artifacts.read_json(smoke.folder / "manifest.json")
    assert manifest["recipe"]["prune"]["ratio"] == 0.3
    assert list(manifest["stages"]) == NAMES
    for name, entry in manifest["stages"].items():
        assert entry["sha256"] == artifacts.read_manifest(smoke.folder / name)["sha256"]


def test_a_run_reports_exactly_the_figures_that_a_gate_may_name(smoke):
    assert set(smoke.figures) == figures.expected(recipe_file.load(SMOKE))
    assert all(math.isfinite(value) and value > 0 for value in smoke.figures.values())


def test_the_pruned_model_is_smaller_by_what_was_asked_for(smoke):
    unit = 8 * 3 * 128 * 7  # eight channels in each of seven blocks of hidden size 128
    dense = smoke.figures["block_parameters.dense"]
    assert abs(dense * 0.7 - smoke.figures["block_parameters.pruned"]) <= unit
    stored = load_file(smoke.folder / "export" / "transformers" / "model.safetensors")
    assert sum(t.numel() for t in stored.values()) == smoke.figures["parameters.pruned"]


def test_the_text_that_was_used_is_identified(smoke):
    scored = artifacts.read_json(smoke.folder / "score" / "scores.json")["calibration"]
    assert scored["text_sha256"] == text.read("builtin:pydocs", "calibration").sha256
    assert artifacts.read_json(smoke.folder / "recover" / "recover.json")["calibration"] == scored
    tested = artifacts.read_json(smoke.folder / "evaluate" / "evaluate.json")
    assert tested["text_sha256"] == text.read("builtin:pydocs", "test").sha256


def test_the_report_is_one_page_that_asks_nothing_of_the_network_and_shows_every_row(smoke):
    page = (smoke.folder / "report" / "report.html").read_text(encoding="utf-8")
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'>\s)]{1,40})""", page)
    assert links and all(link.startswith("data:") for link in links)
    for label in ("Parameters", "of which in blocks", "Weights", "KV cache", "Perplexity",
                  "Bits/byte", "Prefill", "Time to first token", "Decode", "quartiles",
                  "perplexity.ratio", "block_parameters.ratio", "All gates passed."):
        assert label in page, label
    assert page.count("data:image/png;base64,") == 3


def test_the_markdown_report_shows_the_same_rows_as_the_page(smoke):
    page = (smoke.folder / "report" / "report.html").read_text(encoding="utf-8")
    markdown = (smoke.folder / "report" / "report.md").read_text(encoding="utf-8")
    rows = [line for line in markdown.splitlines()
            if re.match(r"\| +(Param|Perpl|Bits|Decode)", line)]
    assert len(rows) == 4
    for row in rows:
        for cell in row.strip("|").split("|"):
            assert cell.strip() in page, cell
    for name in re.findall(r"\]\((\w+\.png)\)", markdown):
        assert (smoke.folder / "report" / name).read_bytes().startswith(b"\x89PNG")


def test_the_report_s_commands_reproduce_the_run(smoke, tmp_path):
    markdown = (smoke.folder / "report" / "report.md").read_text(encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(markdown.split("```yaml\n")[1].split("```")[0])
    assert recipe_file.load(tmp_path / "recipe.yaml") == recipe_file.load(SMOKE)


def test_the_gates_are_written_as_junit_xml(smoke):
    root = ElementTree.parse(smoke.folder / "gate" / "junit.xml").getroot()
    assert (root.tag, root.get("tests"), root.get("failures")) == ("testsuite", "2", "0")
    assert [case.get("name") for case in root] == [
        "perplexity.ratio at most 5", "block_parameters.ratio at most 0.75"]


# Reuse

def test_a_second_run_reuses_every_stage_and_loads_no_torch(smoke):
    code = ("import sys; from bipdeploy.cli.commands import app\n"
            "app(['run', sys.argv[1], '--runs', sys.argv[2], '--json'], standalone_mode=False)\n"
            "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))")
    before = tree(smoke.folder)
    shown, loaded = python(code, SMOKE, smoke.folder.parent).stdout.splitlines()
    assert json.loads(shown)["ran"] == [] and json.loads(shown)["reused"] == NAMES
    assert json.loads(shown)["figures"] == smoke.figures
    assert loaded == "[]"
    assert tree(smoke.folder) == before


def test_another_ratio_reruns_from_prune_on_and_not_score(again):
    before = again().figures
    result = again("prune.ratio=0.5")
    assert (result.reused, result.ran) == (NAMES[:2], NAMES[2:])
    assert result.figures["block_parameters.ratio"] < before["block_parameters.ratio"]
    assert result.figures["perplexity.pruned"] > before["perplexity.pruned"]
    assert result.figures["perplexity.dense"] == before["perplexity.dense"]


@pytest.mark.parametrize(("override", "first"), [
    ("seed=1", "score"), ("score.criterion=magnitude", "score"),
    ("calibration.samples=16", "score"),
    ("prune.round_to=16", "prune"), ("hardware.tensor_parallel=2", "prune"),
    ("recover.refit.ridge=0.1", "recover"),
    ("evaluate.perplexity.max_tokens=512", "evaluate"), ("bench.torch.new_tokens=3", "bench"),
    ("gates.perplexity.ratio.max=6", "gate")])
def test_a_change_reruns_the_first_stage_that_depends_on_it(again, override, first):
    result = again(override, until=first)
    assert (result.reused, result.ran) == (NAMES[:NAMES.index(first)], [first])


def test_text_that_a_rule_gives_is_reused_where_it_is_the_same(again):
    """32 windows of 64 are 16/3 tokens for each of 384 channels; half of that is other text."""
    rule = ("calibration.samples=null", "calibration.tokens_per_channel=5.33")
    result = again(*rule, until="recover")
    assert (result.reused, result.ran) == (NAMES[:4], [])
    result = again(rule[0], "calibration.tokens_per_channel=2.66", until="score")
    assert result.ran == ["score"]
    made = artifacts.read_json(again.folder / "score" / "scores.json")["calibration"]
    assert made["windows"] == [16, 64]
    section = artifacts.read_manifest(again.folder / "score")["sections"]["calibration"]
    assert (section["samples"], section["tokens_per_channel"]) == (16, None)


def test_where_activations_are_kept_reruns_nothing(again):
    result = again("calibration.spill=true", until="recover")
    assert (result.reused, result.ran) == (NAMES[:4], [])


def test_another_gate_reruns_the_judgement_and_the_report_alone(again):
    result = again("gates.perplexity.ratio.max=1.0")
    assert result.ran == ["gate", "report"]
    (failed,) = result.failed_gates
    assert failed["figure"] == "perplexity.ratio"
    ratio = result.figures["perplexity.ratio"]
    assert failed["why"] == (f"is {ratio:.4g}, {ratio - 1:.4g} above the bound of 1 "
                             f"({ratio - 1:.1%})")
    assert "A gate failed." in (again.folder / "report" / "report.html").read_text()
    root = ElementTree.parse(again.folder / "gate" / "junit.xml").getroot()
    assert root.get("failures") == "1"
    assert root.find("testcase/failure").get("message") == f"perplexity.ratio {failed['why']}"


def test_force_reruns_every_stage_until_the_last_that_is_wanted(again):
    result = again(force=True, until="prune")
    assert (result.ran, result.reused) == (["score", "curves", "prune"], [])


def test_from_reruns_from_a_stage_on(again):
    result = again(start="gate")
    assert (result.reused, result.ran) == (NAMES[:-2], ["gate", "report"])


def test_until_ends_after_a_stage_and_a_later_run_goes_on_from_there(tmp_path, again):
    for name in NAMES[4:]:
        shutil.rmtree(again.folder / name)
    assert again(until="recover").ran == []
    assert not (again.folder / "tune").exists()
    result = again(until="export")
    assert (result.reused, result.ran) == (NAMES[:4], ["tune", "export"])


def test_figures_and_gates_of_stages_that_no_longer_hold_are_not_shown(again):
    again("gates.perplexity.ratio.max=1.0")
    result = again("prune.ratio=0.5", until="prune")
    assert result.figures and all(name.startswith(("parameters", "block_", "weights", "kv_"))
                                  for name in result.figures)
    assert result.failed_gates == []
    manifest = artifacts.read_json(again.folder / "manifest.json")
    assert list(manifest["stages"]) == ["score", "curves", "prune"]


def test_a_run_s_manifest_keeps_the_stages_that_still_hold(again):
    assert again(start="prune", until="prune").ran == ["prune"]
    assert list(artifacts.read_json(again.folder / "manifest.json")["stages"]) == NAMES


def test_a_stage_to_start_from_that_comes_after_the_last_is_refused(again):
    with pytest.raises(InputError, match="--from bench comes after --until prune"):
        again(start="bench", until="prune")


@pytest.mark.parametrize("option", ["start", "until"])
def test_an_unknown_stage_is_refused_with_the_one_that_was_meant(again, option):
    with pytest.raises(InputError, match="did you mean 'recover'"):
        again(**{option: "recovery"})


@pytest.mark.parametrize(("stage", "name"), [("recover", "model/model.safetensors"),
                                             ("prune", "kept.json"), ("score", "manifest.json")])
def test_a_stage_whose_file_is_gone_reruns(again, stage, name):
    (again.folder / stage / name).unlink()
    result = again(until="recover")
    assert result.ran == [stage]
    assert (again.folder / stage / name).is_file()


@pytest.mark.parametrize(("stage", "name"), [("prune", "model/model.safetensors"),
                                             ("gate", "gates.json"), ("bench", "manifest.json")])
def test_a_stage_whose_file_is_cut_off_reruns(again, stage, name):
    path = again.folder / stage / name
    path.write_bytes(path.read_bytes()[:40])
    assert again(until="gate").ran == [stage]
    assert path.stat().st_size > 40


def test_without_repair_the_sliced_model_is_exported(again):
    result = again("recover.method=none", until="export")
    assert (result.reused, result.ran) == (NAMES[:3], ["recover", "tune", "export"])
    exported, sliced = (hashes(again.folder / folder)
                        for folder in ("export/transformers", "prune/model"))
    assert exported.pop("README.md") and exported == sliced


def test_stages_that_are_off_say_so_and_a_gate_on_them_cannot_be_set(again):
    off = ["evaluate.perplexity.enabled=false", "bench.torch.enabled=false",
           "export.transformers.enabled=false"]
    with pytest.raises(InputError, match="no enabled stage measures 'perplexity"):
        again(*off)
    text = SMOKE.read_text(encoding="utf-8").partition("gates:")[0]
    result = api.run(recipe_file.parse(text, "r.yaml", off), runs=again.folder.parent)
    assert not any("perplexity" in name or "decode" in name for name in result.figures)
    page = (again.folder / "report" / "report.md").read_text()
    assert "not run: export.transformers.enabled is false" in page
    assert "not run: bench.torch.enabled is false" in page


# Written whole or not at all

def test_an_interrupted_stage_leaves_what_stood_there(tmp_path):
    final = tmp_path / "stage"
    with artifacts.writing(final) as partial:
        (partial / "a").write_text("first")
    with pytest.raises(KeyboardInterrupt), artifacts.writing(final) as partial:
        (partial / "a").write_text("second")
        raise KeyboardInterrupt
    assert (final / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [final]


def test_what_an_earlier_crash_left_half_written_is_cleared_away(tmp_path):
    (tmp_path / ".stage.partial").mkdir()
    (tmp_path / ".stage.partial" / "rest").write_text("half")
    with artifacts.writing(tmp_path / "stage") as partial:
        assert list(partial.iterdir()) == []
    assert [p.name for p in tmp_path.iterdir()] == ["stage"]


def test_an_error_of_a_stage_s_own_code_is_one_line_that_names_the_stage(tmp_path, smoke):
    scores = shutil.copytree(smoke.folder / "score", tmp_path / "score")
    (scores / "scores.safetensors").write_bytes(b"no scores")
    with pytest.raises((InputError, StageError), match=r"prune|scores") as caught:
        api.prune("builtin:pico", scores, tmp_path / "out", ratio=0.3)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and leftovers(tmp_path) == []


@pytest.mark.parametrize(("stage", "advice"), [
    ("score", "calibration.spill: true"), ("recover", "calibration.spill: true"),
    ("curves", "prune.search.windows"), ("prune", "prune.search.windows"),
    ("export", "export.onnx"),
    ("evaluate", "evaluate.perplexity.batch"), ("bench", "bench.torch.batch")])
def test_a_stage_that_runs_out_of_memory_says_what_to_lower(tmp_path, monkeypatch, stage, advice):
    monkeypatch.setattr(Stage, "load", lambda _: lambda _: torch.empty(1 << 50))
    recipe = recipe_file.build({"name": "x", "model": {"id": "builtin:pico"},
                                "prune": {"ratio": 0.3}}, "test", [])
    with pytest.raises(StageError, match=rf"stage {stage} ran out of memory; .*{advice}"):
        pipeline.run_stage(stage, recipe, {}, tmp_path / stage, "", Silent())
    assert list(tmp_path.iterdir()) == []


# Same in, same out

@pytest.mark.slow
def test_the_same_recipe_in_another_process_gives_the_same_bytes(smoke, tmp_path):
    code = "import sys, bipdeploy; bipdeploy.run(sys.argv[1], runs=sys.argv[2], until='recover')"
    python(code, SMOKE, tmp_path, env={"PYTHONHASHSEED": "11"})
    for name in ("score/scores.safetensors", "prune/model", "recover/model"):
        assert hashes(tmp_path / "smoke" / name) == hashes(smoke.folder / name), name


def test_the_stages_one_by_one_on_plain_paths_give_the_same_as_a_run(smoke, tmp_path, capsys):
    def command(*arguments: object) -> None:
        cli.app([str(a) for a in arguments], standalone_mode=False)

    calibration = ["--set", "calibration.samples=32", "--set", "calibration.tokens=64"]
    command("score", "builtin:pico", "--out", tmp_path / "s", *calibration)
    command("prune", "builtin:pico", tmp_path / "s", "--out", tmp_path / "p", "--ratio", 0.3,
            "--set", "prune.round_to=8")
    command("recover", "builtin:pico", tmp_path / "p", "--out", tmp_path / "r", *calibration)
    command("export", tmp_path / "r", "--out", tmp_path / "x")
    capsys.readouterr()
    command("evaluate", "builtin:pico", tmp_path / "x", "--out", tmp_path / "e", "--set",
             "evaluate.perplexity.max_tokens=8192")
    shown = capsys.readouterr().out
    assert "Perplexity" in shown and f"wrote {tmp_path / 'e'}" in shown
    command("gate", tmp_path / "e", tmp_path / "p", "--out", tmp_path / "g",
            "--set", "gates.perplexity.ratio.max=5")
    assert "passed  perplexity.ratio" in capsys.readouterr().out
    command("report", smoke.folder, "--out", tmp_path / "report")
    assert (tmp_path / "report" / "report.html").is_file()
    for ours, theirs in (("s/scores.safetensors", "score/scores.safetensors"),
                         ("p/model", "prune/model"), ("r/model", "recover/model"),
                         ("x/transformers/model.safetensors",
                          "export/transformers/model.safetensors")):
        assert hashes(tmp_path / ours) == hashes(smoke.folder / theirs), ours
    measured = artifacts.figures([tmp_path / "e"])
    assert measured == {name: smoke.figures[name] for name in measured}


def test_a_report_is_made_anew_from_a_run_s_folder(smoke, tmp_path):
    api.report(smoke.folder, tmp_path / "report")
    old, new = (artifacts.read_json(folder / "summary.json")
                for folder in (smoke.folder / "report", tmp_path / "report"))
    assert new == old
    assert {p.name for p in (tmp_path / "report").iterdir()} == {
        p.name for p in (smoke.folder / "report").iterdir()}


# True figures

def test_the_exported_model_loads_with_transformers_alone_and_has_the_perplexity_reported(smoke):
    folder = smoke.folder / "export" / "transformers"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.read("builtin:pydocs", "test").joined(), verbose=False,
                    return_tensors="pt")["input_ids"][0, :8192]
    losses = []
    with torch.no_grad():
        for window in ids.split(128):
            losses.append(float(model(window[None], labels=window[None]).loss))
    assert len(losses) == 64
    # On a GPU the run computes in the checkpoint's own type, bfloat16.
    assert math.exp(sum(losses) / 64) == pytest.approx(
        smoke.figures["perplexity.pruned"], rel=2e-3 if torch.cuda.is_available() else 1e-4)


def test_the_exported_model_writes_text(smoke):
    folder = smoke.folder / "export" / "transformers"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Return a list of", return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert out.shape[1] == ids.shape[1] + 8


@torch.no_grad()
def test_perplexity_equals_a_token_by_token_computation(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    source = text.Text("t", "test", ("A function that returns a value. " * 6,))
    ids = windows.token_ids(source, PICO)[:45]
    nats = []
    for window in (ids[0:20], ids[20:40]):  # the last five tokens fill no window
        for position in range(1, 20):
            logits = model(window[None, :position]).logits[0, -1].double()
            nats.append(-float(logits.log_softmax(-1)[window[position]]))
    seen = []
    found = perplexity(forward_of(model), ids, window=20, batch=1, advance=seen.append)
    assert found.tokens == len(nats) == 38 and seen == [1, 1]
    assert found.perplexity == pytest.approx(math.exp(sum(nats) / 38), rel=1e-5)
    assert found.bits_per_byte(0.25) == pytest.approx(sum(nats) / 38 / math.log(2) / 4, rel=1e-5)


@torch.no_grad()
def test_perplexity_does_not_depend_on_the_batch(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    ids = torch.arange(7 * 16) % 4096
    one, three = (perplexity(forward_of(model), ids, 16, batch).nats for batch in (1, 3))
    assert one == pytest.approx(three, rel=1e-6)


@torch.no_grad()
def test_perplexity_holds_the_logits_of_a_slice_only(tiny, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    ids = torch.arange(6 * 16) % 4096
    whole = perplexity(forward_of(model), ids, 16, 3)
    monkeypatch.setattr(tune, "LOGITS_AT_ONCE", 5 * 4096)
    parts = [part.shape for part in forward_of(model)(ids.view(6, 16))]
    assert [rows for rows, _ in parts] == [5] * 19 + [1] and {v for _, v in parts} == {4096}
    found = perplexity(forward_of(model), ids, 16, 3)
    assert found.tokens == whole.tokens and found.nats == pytest.approx(whole.nats, rel=1e-6)


def test_bits_per_byte_counts_the_bytes_of_the_text(smoke):
    source = text.read("builtin:pydocs", "test")
    per_byte = len(windows.token_ids(source, PICO)) / len(source.joined().encode())
    for which in ("dense", "pruned"):
        bits = math.log2(smoke.figures[f"perplexity.{which}"]) * per_byte
        assert smoke.figures[f"bits_per_byte.{which}"] == pytest.approx(bits, rel=1e-9)


def test_timed_rounds_run_each_once_in_turns_and_keep_no_warm_up():
    order: list[str] = []
    rounds: list[int] = []

    def measured(name: str):
        def call() -> dict[str, float]:
            order.append(name)
            return {"t": float(len(order))}
        return call

    kept = interleaved({"dense": measured("d"), "pruned": measured("p")}, repeats=3, warmup=2,
                       advance=lambda: rounds.append(len(order)))
    assert "".join(order) == "pd" "dp" "pd" "dp" "pd"
    assert rounds == [2, 4, 6, 8, 10]
    assert kept == {"dense": {"t": [6, 7, 10]}, "pruned": {"t": [5, 8, 9]}}


def test_a_speedup_is_the_median_of_the_ratios_within_rounds():
    assert speedup([2.0, 4.0, 9.0], [1.0, 1.0, 3.0]) == Spread(3.0, 2.5, 3.5)


def test_speeds_are_consistent_with_each_other(smoke):
    for which in ("dense", "pruned"):
        assert smoke.figures[f"ttft.{which}"] >= smoke.figures[f"prefill.{which}"]
    details = artifacts.read_json(smoke.folder / "bench" / "bench.json")["torch"]
    for name, spread in details["spread"].items():
        assert spread["low"] <= spread["median"] <= spread["high"]
        assert smoke.figures[name] == spread["median"]


def hashes(path: Path) -> dict[str, str] | str:
    return artifacts.file_hashes(path) if path.is_dir() else artifacts.sha256(path)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time."""
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns)
            for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("visible", "left"), [
    (None, ["A", "B"]), ("", []), ("-1", []), ("1", ["B"]), ("1,0", ["B", "A"]),
    ("0,7,1", ["A"]), ("GPU-8f2", ["GPU-8f2"])])
def test_the_gpus_are_those_that_cuda_may_use(visible, left):
    assert machine.visible_gpus(["A", "B"], visible) == left


class FakeCuda:
    """Stands for `torch.cuda` on a machine with two GPUs."""

    def __init__(self, peaks: tuple[int, ...]):
        self.peaks, self.calls = peaks, []

    def is_initialized(self):
        return True

    def device_count(self):
        return len(self.peaks)

    def empty_cache(self):
        self.calls.append("empty_cache")

    def reset_peak_memory_stats(self, number):
        self.calls.append(f"reset {number}")

    def max_memory_allocated(self, number):
        return self.peaks[number]


def test_a_stage_starts_with_what_earlier_ones_left_given_back_and_its_own_peak(
        tmp_path, monkeypatch):
    cuda = FakeCuda((1 << 20, 3 << 20))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    machine.release_memory()
    found = machine.PeakMemory().record()
    assert cuda.calls == ["empty_cache", "reset 0", "reset 1"]
    assert found["peak_gpu_memory_bytes"] == 3 << 20
    monkeypatch.undo()
    calls = []
    monkeypatch.setattr(machine, "release_memory", lambda: calls.append("release"))
    monkeypatch.setattr(machine, "PeakMemory",
                        lambda: calls.append("peak") or SimpleNamespace(record=dict))
    with suppress(BipdeployError):
        pipeline.run_stage("score", SimpleNamespace(), {}, tmp_path / "score", "key", Silent())
    assert calls == ["release", "peak"]
