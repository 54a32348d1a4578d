"""The command line: what it shows, its exit codes, and that it starts without heavy imports."""

from __future__ import annotations

import json
import shutil
from xml.etree import ElementTree

import pytest

import bipdeploy as package
from bipdeploy.recipe import file as recipe_file
from bipdeploy.running import artifacts
from bipdeploy.stages.table import STAGES
from tests.running import RECIPES, SMOKE, bipdeploy, bipdeploy_here, message, python

COMMANDS = ["run", "check", "plan", "schema", *STAGES]
LOADED = ("\nprint('LOADED', sorted({'torch', 'transformers', 'datasets', 'pydantic', 'numpy',"
          " 'safetensors'} & set(sys.modules)))")


def loaded_by(*arguments: object) -> str:
    """Which heavy libraries a command line has loaded when it ends."""
    code = ("import sys, contextlib; from bipdeploy.cli.commands import main\n"
            "sys.argv[0] = 'bipdeploy'\n"
            "with contextlib.suppress(SystemExit): main()" + LOADED)
    return python(code, *arguments).stdout.rpartition("LOADED ")[2].strip()


def rerun(smoke, tmp_path, *arguments: object):
    """`bipdeploy run` of the smoke recipe over a copy of its finished run."""
    shutil.copytree(smoke.folder, tmp_path / "smoke")
    return bipdeploy_here("run", SMOKE, "--runs", tmp_path, *arguments)


# Help

def test_help_names_every_command_and_the_exit_codes():
    done = bipdeploy("--help")
    assert done.returncode == 0 and done.stderr == ""
    for command in COMMANDS:
        assert f" {command} " in done.stdout, command
    assert "0 passed, 1 a stage failed, 2 bad input, 3 a gate failed" in done.stdout


def test_help_loads_neither_torch_nor_transformers_nor_pydantic():
    assert loaded_by("--help") == "[]"


def test_checking_every_recipe_needs_no_torch():
    assert loaded_by("check", *sorted(RECIPES.glob("*.yaml"))) == "['pydantic']"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    from bipdeploy.cli.commands import app

    app([command, "--help"], prog_name="bipdeploy", standalone_mode=False)
    assert f"Usage: bipdeploy {command}" in capsys.readouterr().out


def test_the_version_is_shown():
    done = bipdeploy("--version")
    assert done.stdout == f"bipdeploy {package.__version__}\n" and done.returncode == 0


# Exit code 0

def test_check_accepts_every_recipe():
    recipes = sorted(RECIPES.glob("*.yaml"))
    done = bipdeploy("check", *recipes)
    assert (done.returncode, done.stderr) == (0, "")
    said = [line for line in done.stdout.splitlines() if not line.startswith("    calibration: ")]
    assert said == [f"ok  {path}" for path in recipes]


def test_the_schema_is_printed_as_the_file_that_the_recipes_name():
    done = bipdeploy("schema")
    assert done.returncode == 0
    assert done.stdout == (RECIPES / "schema.json").read_text(encoding="utf-8")
    assert json.loads(done.stdout) == recipe_file.schema()


def test_a_finished_run_shows_its_table_gates_and_paths_within_80_columns(smoke):
    done = bipdeploy("run", SMOKE, "--runs", smoke.folder.parent)
    assert done.returncode == 0
    assert message(done) == [f"reused, nothing changed: {', '.join(STAGES)}"]
    table, gates, paths = done.stdout.strip("\n").split("\n\n")
    rows = table.splitlines()
    assert rows[0].split() == ["dense", "pruned", "pruned", "/", "dense", "quartiles"]
    assert len(rows) == 1 + 9 and max(map(len, rows)) <= 80
    for row in rows[1:]:  # no label is wrapped: each row has its figures
        assert sum(character.isdigit() for character in row) > 6, row
    assert [line.split()[:2] for line in gates.splitlines()] == [
        ["passed", "perplexity.ratio"], ["passed", "block_parameters.ratio"]]
    for line in paths.splitlines():
        name, path = line.split(maxsplit=1)
        assert name in ("model", "report", "manifest")
        assert path.startswith(str(smoke.folder)) and artifacts.Path(path).exists()


def test_figures_come_as_json_on_stdout_and_nothing_else(smoke):
    done = bipdeploy("run", SMOKE, "--runs", smoke.folder.parent, "--json")
    shown = json.loads(done.stdout)
    assert shown["figures"] == smoke.figures and shown["failed_gates"] == []
    assert shown["folder"] == str(smoke.folder)


def test_a_path_with_brackets_is_shown_as_it_is(smoke, tmp_path):
    runs = tmp_path / "runs [bold]"
    shutil.copytree(smoke.folder, runs / "smoke")
    recipe = shutil.copy(SMOKE, runs / "[red].yaml")
    assert f"{runs / 'smoke' / 'manifest.json'}\n" in bipdeploy("run", SMOKE, "--runs", runs).stdout
    assert bipdeploy("check", recipe).stdout == f"ok  {recipe}\n"


# Exit code 1

@pytest.mark.slow
def test_a_stage_that_fails_exits_with_1_and_names_the_way_to_the_traceback(smoke, tmp_path):
    scores = shutil.copytree(smoke.folder / "score", tmp_path / "scores")
    (scores / "scores.json").write_text("{}")  # whole, but not what the stage wrote
    arguments = ("prune", "builtin:pico", scores, "--out", tmp_path / "p", "--ratio", "0.3")
    done = bipdeploy(*arguments)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert message(done) == ["error: stage prune failed: KeyError: 'comparable'; earlier stages "
                             "are kept, BIPDEPLOY_DEBUG=1 shows the traceback"]
    debugged = bipdeploy(*arguments, env={"BIPDEPLOY_DEBUG": "1"})
    assert debugged.returncode == 1 and "Traceback" in debugged.stderr


# Exit code 2

def test_check_reports_all_faults_of_all_recipes(tmp_path):
    (tmp_path / "a.yaml").write_text("name: a\nmodel: {id: x}\nprune: {ratio: 2, raund_to: 8}\n")
    (tmp_path / "b.yaml").write_text("name: [\n")
    done = bipdeploy("check", tmp_path / "a.yaml", SMOKE, tmp_path / "b.yaml")
    assert done.returncode == 2
    assert done.stdout == f"ok  {SMOKE}\n"
    lines = done.stderr.splitlines()
    assert lines[0] == f"error: {tmp_path / 'a.yaml'}: 2 faults"
    assert lines[1].startswith("  line 3: prune.ratio: 2 is not accepted")
    assert lines[2] == "  line 3: prune.raund_to: unknown field (did you mean 'round_to'?)"
    assert lines[3] == f"{tmp_path / 'b.yaml'}: 1 fault"
    assert lines[4].startswith("  line 2: not YAML: ") and len(lines) == 5


@pytest.mark.parametrize("arguments", [(), ("run",), ("ruin", SMOKE), ("run", SMOKE, "--fource"),
                                       ("prune", "builtin:pico", "s", "--ratio", "0.3")])
def test_a_wrong_command_line_exits_with_2(arguments):
    done = bipdeploy(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "Usage: bipdeploy" in done.stdout + done.stderr


# Exit code 3

def test_a_gate_that_fails_exits_with_3_and_says_which_and_by_how_much(smoke, tmp_path):
    done = rerun(smoke, tmp_path, "--set", "gates.perplexity.ratio.max=1.0")
    assert done.returncode == 3
    ratio = smoke.figures["perplexity.ratio"]
    why = f"is {ratio:.4g}, {ratio - 1:.4g} above the bound of 1 ({ratio - 1:.1%})"
    assert message(done)[-1] == f"error: gate perplexity.ratio {why}"
    assert f"FAILED  perplexity.ratio {why}" in done.stdout
    assert "passed  block_parameters.ratio" in done.stdout
    assert str(tmp_path / "smoke" / "report" / "report.html") in done.stdout
    root = ElementTree.parse(tmp_path / "smoke" / "gate" / "junit.xml").getroot()
    assert root.get("failures") == "1"
    again = bipdeploy("run", SMOKE, "--runs", tmp_path, "--set",
                      "gates.perplexity.ratio.max=1.0")
    assert again.returncode == 3  # a reused verdict fails as well


def test_every_gate_that_fails_has_a_line(smoke, tmp_path):
    done = rerun(smoke, tmp_path, "--set", "gates.perplexity.ratio.max=1",
                 "--set", "gates.block_parameters.ratio={min: 0.9}", "--until", "gate")
    assert done.returncode == 3
    assert sum("gate perplexity.ratio is" in line or "gate block_parameters.ratio is" in line
               for line in message(done)) == 2
    assert "below the bound of 0.9" in done.stderr


def test_a_failed_gate_does_not_count_when_the_run_ends_before_it(smoke, tmp_path):
    done = rerun(smoke, tmp_path, "--set", "gates.perplexity.ratio.max=1.0", "--until", "bench")
    assert done.returncode == 0 and "FAILED" not in done.stdout


def test_the_gate_command_judges_folders_and_exits_with_3(smoke, tmp_path):
    done = bipdeploy("gate", smoke.folder / "prune", smoke.folder / "evaluate", "--out",
                     tmp_path / "g", "--set", "gates.perplexity.ratio.max=1.0",
                     "--set", "gates.parameters.ratio.max=0.9")
    assert done.returncode == 3
    assert "gate perplexity.ratio is" in message(done)[-1]
    assert "passed  parameters.ratio" in done.stdout
    verdicts = artifacts.read_json(tmp_path / "g" / "gates.json")
    assert verdicts["passed"] is False and len(verdicts["gates"]) == 2


def test_a_gate_on_a_figure_that_was_not_measured_fails(smoke, tmp_path):
    done = bipdeploy("gate", smoke.folder / "prune", "--out", tmp_path / "g", "--set",
                     "gates.decode.speedup.min=1.0")
    assert done.returncode == 3
    assert message(done)[-1] == "error: gate decode.speedup was not measured"


def test_the_api_is_not_hidden_by_packages_of_the_same_name():
    python("import importlib, bipdeploy, pkgutil\n"
           "for module in pkgutil.iter_modules(bipdeploy.__path__):\n"
           "    importlib.import_module(f'bipdeploy.{module.name}')\n"
           "assert all(map(callable, (getattr(bipdeploy, name) for name in bipdeploy.__all__)))")


def test_check_finds_what_a_sweep_could_not_run():
    fields = ["--set", "sweep.ratios=[0.2,0.3]", "--set"]
    for setting, fault in (
            ("sweep.fields={prune.rato: [0.1, 0.2]}",
             "sweep.fields.prune.rato: unknown field (did you mean 'ratio'?)"),
            ("sweep.fields={calibration.tokens: [8, 9999]}", "calibration.tokens: 9999 is longer")):
        done = bipdeploy_here("check", SMOKE, *fields, setting)
        assert done.returncode == 2 and message(done)[1].strip().startswith(fault)
    assert bipdeploy_here("check", SMOKE, *fields, "seed=1").returncode == 0
