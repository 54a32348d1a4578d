"""What a recipe may name and what carries it out are two lists that agree; rows have one shape."""

from __future__ import annotations

import inspect
from operator import attrgetter

import pytest

from bipdeploy.exporters.table import EXPORTERS
from bipdeploy.measuring.table import ENGINES
from bipdeploy.measuring.tasks import METRICS, TASKS, find
from bipdeploy.model.families import FAMILIES
from bipdeploy.planning.gpus import GPUS
from bipdeploy.planning.targets import TARGETS
from bipdeploy.pruning.criteria.statistics import Statistics
from bipdeploy.pruning.criteria.table import CRITERIA
from bipdeploy.recipe import names, tasks
from bipdeploy.recipe.bench import BenchSection
from bipdeploy.recipe.export import ExportSection
from bipdeploy.recipe.model import ShapeSection
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.recipe.target import TargetSection
from bipdeploy.stages.repairs import REPAIRS
from bipdeploy.stages.table import ARTEFACTS, STAGES
from bipdeploy.table import Row, by_name, loaded

TABLES = {"criteria": CRITERIA, "repairs": REPAIRS, "targets": TARGETS, "exporters": EXPORTERS,
          "engines": ENGINES, "stages": STAGES, "tasks": TASKS}
ROWS = [pytest.param(row, id=f"{kind}-{name}") for kind, table in TABLES.items()
        for name, row in table.items()]


@pytest.mark.parametrize(("table", "listed"), [
    (CRITERIA, names.CRITERIA), (REPAIRS, names.REPAIRS), (TARGETS, names.TARGETS),
    (GPUS, names.GPUS), (EXPORTERS, ExportSection.model_fields),
    (ENGINES, BenchSection.model_fields), (TASKS, tasks.BUILTIN)])
def test_what_a_recipe_may_name_is_what_there_is(table, listed):
    assert sorted(table) == sorted(listed)


def test_the_order_of_names_is_that_of_the_tables():
    assert list(CRITERIA) == list(names.CRITERIA)
    assert [name for name, row in CRITERIA.items() if row.counts] == list(names.COUNTING)
    assert list(TARGETS) == list(names.TARGETS) == list(TargetSection.model_fields)[:len(TARGETS)]


def test_a_comparison_s_names_are_made_of_the_recipe_s():
    known = {spread.removeprefix(names.DEPTH) for spread in names.LAYERS_COMPARED}
    assert known == {*names.LAYERS, "blocks", "attention", "ffn"}
    assert {name.partition(":")[0] for name in names.CRITERIA_COMPARED} == set(CRITERIA)
    assert {own["recover"]["method"] for own in names.REPAIRS_COMPARED.values()} == set(REPAIRS)


@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_of_the_one_shape_and_has_a_function_that_exists(row):
    assert isinstance(row, Row)
    assert callable(row.load())


def test_two_rows_of_one_name_are_refused():
    row = Row("a", (), None, "bipdeploy.stages.gate:run")
    with pytest.raises(ValueError, match="one name"):
        by_name(row, row)


def test_what_is_rehearsed_exists():
    assert [name for name, stage in STAGES.items()
            if stage.rehearsal and callable(loaded(stage.rehearsal))] == [
                "prune", "tune", "evaluate"]


def test_the_tasks_of_the_published_table_have_their_metrics():
    assert set(METRICS) == set(tasks.GROUPS["llm_bip_7"])
    assert tasks.names(list(tasks.BUILTIN)) == [
        task.name for task in find(list(tasks.BUILTIN))]


def test_stages_read_what_is_there_by_then_and_sections_that_a_recipe_has():
    made, recipe = {"dense"}, Recipe.model_validate(
        {"name": "x", "model": {"id": "y"}, "prune": {"ratio": 0.3}})
    for name, stage in STAGES.items():
        for artefact in stage.needs:
            places = ARTEFACTS.get(artefact, (artefact,))
            assert {place.partition("/")[0] for place in places} <= made, (name, artefact)
        for field in (*stage.sections, *stage.curves, *stage.rounds, *stage.learned):
            assert attrgetter(field)(recipe) is not None, (name, field)
        made.add(name)


def test_repairs_and_engines_need_what_their_stage_is_given_or_an_export_writes():
    assert all({*row.needs} <= {*STAGES["recover"].needs} for row in REPAIRS.values())
    assert all({*row.needs} <= EXPORTERS.keys() for row in ENGINES.values())


def test_criteria_need_statistics_that_a_walk_collects():
    source = inspect.getsource(Statistics)
    needed = {need for row in CRITERIA.values() for need in row.needs}
    assert {need for need in needed if f'"{need}" in self.needs' not in source} == {"gradients"}


def test_the_recipe_says_which_model_types_there_are():
    said = ShapeSection.model_fields["model_type"].description or ""
    assert all(name in said for name in FAMILIES)
