"""The shape of the package: imports go one way, files stay short, heavy libraries load late."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
from pathlib import Path

import pytest

import bipdeploy
from tests.architecture import ORDER, circles, imported, modules, room, upward
from tests.running import ROOT, python

PACKAGE = Path(bipdeploy.__file__).parent
MODULES = modules(PACKAGE)
NAMES = {module.removeprefix("bipdeploy").removeprefix(".") for module in MODULES}

HEAVY = {"torch", "transformers", "datasets", "safetensors", "tokenizers", "numpy", "matplotlib",
         "onnx", "onnx_ir", "onnxruntime", "lm_eval", "accelerate", "peft", "ray"}
# Rooms that load none of these, but for the modules named below; then modules of other rooms.
LIGHT_ROOMS = ("", "errors", "table", "recipe", "running", "data", "reporting", "planning",
               "serving", "pipeline", "comparing", "sweeping", "api", "cli", "__main__")
HEAVY_MODULES = ("comparing.run", "sweeping.engine", "sweeping.rough")
LIGHT_MODULES = (
    "model.sources", "model.families", "model.cost", "model.tensor_file", "model.checkpoint",
    "model.formats", "model.routes", "pruning.divisibility", "pruning.depth", "pruning.allocation",
    "pruning.criteria.table", "ort.installed", "ort.folder", "exporters.table",
    "exporters.portability", "measuring.table", "measuring.tasks", "stages.table",
    "stages.repairs", "stages.gate")
LIGHT = [*sorted({name for name in NAMES if name.partition(".")[0] in LIGHT_ROOMS}
                 - set(HEAVY_MODULES)), *LIGHT_MODULES]


def test_imports_go_from_the_command_line_down_to_the_errors_never_up():
    assert list(upward(PACKAGE)) == []


def test_no_module_imports_itself_through_others():
    assert list(circles(PACKAGE)) == []


def test_the_order_names_only_rooms_that_exist_each_once():
    listed = [name for level in ORDER for name in level]
    assert sorted(listed) == sorted({room(module) for module in MODULES})


PLANTED = {
    "at the top": "from bipdeploy.stages import score\n",
    "in a function": "def late():\n    from bipdeploy.api import run\n    return run\n",
    "for type checking": ("from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n"
                          "    from bipdeploy.pipeline.pipeline import RunResult\n"),
    "in a table": "ROW = 'bipdeploy.stages.prune:run'\n",
    "by its name": "import importlib\n\nimportlib.import_module(f'bipdeploy.exporters.{1}')\n",
    "side by side": "from bipdeploy.ort import graph\n",
}


def copied(folder: Path) -> Path:
    """The package's source in another place."""
    return shutil.copytree(PACKAGE, folder / "bipdeploy", ignore=shutil.ignore_patterns("builtin"))


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED.keys())
def test_an_import_that_goes_up_is_found(tmp_path, planted):
    copy = copied(tmp_path)
    assert list(upward(copy)) == []
    (copy / "pruning" / "planted.py").write_text(planted)
    assert [line for line in upward(copy) if line.startswith("bipdeploy.pruning.planted imports ")]


def test_a_room_without_a_place_is_found(tmp_path):
    copy = copied(tmp_path)
    (copy / "helpers.py").write_text("")
    assert list(upward(copy)) == [
        "bipdeploy.helpers is in no room of ORDER (tests/architecture.py)"]


def test_a_circle_within_a_room_is_found(tmp_path):
    copy = copied(tmp_path)
    (copy / "recipe" / "first.py").write_text("from bipdeploy.recipe import second\n")
    (copy / "recipe" / "second.py").write_text(
        "def late():\n    from bipdeploy.recipe.first import second\n    return second\n")
    assert list(circles(copy)) == [
        "bipdeploy.recipe.first → bipdeploy.recipe.second → bipdeploy.recipe.first"]


def test_scripts_that_stand_in_strings_import_what_exists():
    asked = {(path.name, *found) for folder in ("benchmarks", "tests", "docs")
             for path in (ROOT / folder).rglob("*.py") if path.name != "test_architecture.py"
             for found in re.findall(r"\bfrom (bipdeploy[\w.]*) import ([a-zA-Z_]\w*)",
                                     path.read_text(encoding="utf-8"))}
    assert len(asked) > 300
    assert {line for line in asked if f"{line[1]}.{line[2]}" not in MODULES
            and not hasattr(importlib.import_module(line[1]), line[2])} == set()


def test_no_file_is_longer_than_400_lines():
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines())
               for path in MODULES.values()}
    assert {name: count for name, count in lengths.items() if count > 400} == {}


def test_the_lists_of_light_modules_name_only_what_exists():
    assert set(HEAVY_MODULES) | set(LIGHT_MODULES) <= NAMES
    assert set(LIGHT_ROOMS) <= {room(module) for module in MODULES}


def test_heavy_libraries_are_not_imported_at_the_top_of_light_modules():
    early = {name: imported(MODULES[f"bipdeploy.{name}".removesuffix(".")], MODULES,
                            everywhere=False) for name in LIGHT}
    assert {name: found for name, names in early.items()
            if (found := {m.partition(".")[0] for m in names} & HEAVY)} == {}


def test_importing_the_light_modules_loads_no_heavy_library():
    code = ("import importlib, sys\n"
            "for name in sys.argv[2:]:\n"
            "    importlib.import_module(f'bipdeploy.{name}'.removesuffix('.'))\n"
            "print(sorted(set(sys.argv[1].split(',')) & set(sys.modules)))")
    assert python(code, ",".join(sorted(HEAVY)), *LIGHT).stdout.strip() == "[]"


def test_every_module_opens_with_a_sentence_about_it():
    empty = [name for name, path in MODULES.items()
             if not ast.get_docstring(ast.parse(path.read_text()))]
    assert empty == []


def test_the_map_in_contributing_shows_every_room_and_fits_one_screen():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = text.partition("```text\n")[2].partition("```")[0].splitlines()
    assert len(shown) <= 40 and max(map(len, shown)) <= 100
    rooms = {line.split()[0].rstrip("/").removesuffix(".py") for line in shown
             if line.startswith("  ") and not line.startswith("   ")}
    assert rooms == {name or "__init__" for level in ORDER for name in level} | {"builtin"}
