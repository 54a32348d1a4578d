"""The cells of a comparison: what is measured, under which recipe, and what a result depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bipdeploy.data import text
from bipdeploy.data.calibration import fingerprints, test_split, training_split
from bipdeploy.errors import InputError
from bipdeploy.measuring import tasks
from bipdeploy.model import sources
from bipdeploy.model.families import Architecture
from bipdeploy.pipeline.keys import WHERE, plain
from bipdeploy.pipeline.preflight import refuse
from bipdeploy.planning.resolved import Resolved, resolved_at
from bipdeploy.pruning.criteria.table import CRITERIA
from bipdeploy.pruning.depth import droppable
from bipdeploy.recipe import file as recipe_file
from bipdeploy.recipe.base import TextSection
from bipdeploy.recipe.methods import Method, method
from bipdeploy.recipe.names import REPAIRS_COMPARED, repair_settings
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.running import artifacts, machine
from bipdeploy.stages.table import STAGES


@dataclass(frozen=True)
class Cell:
    """One measurement of the table."""

    seed: int
    method: Method
    ratio: float
    repair: str


@dataclass(frozen=True)
class Plan:
    """All that is to be measured. `context`: what every result depends on beside the recipe."""

    resolved: Resolved
    cells: tuple[Cell, ...]
    context: Mapping[str, Any]

    @property
    def recipe(self) -> Recipe:
        return self.resolved.recipe

    @property
    def arch(self) -> Architecture:
        return self.resolved.architecture

    @property
    def dense(self) -> Path:
        return self.resolved.dense


def plan(recipe: Recipe) -> Plan:
    """The cells of a recipe's section `compare`, by seed, method, ratio and repair.

    Raises InputError for all that cannot be measured, before anything is.
    """
    recipe = _compared(recipe)
    dense = sources.dense_folder(recipe.model)
    resolved = resolved_at(recipe, dense)
    section = recipe.compare
    repairs = section.repairs_of(recipe.score.propagation)
    ratios = sorted(set(section.ratios))
    cells = tuple(Cell(seed, m, ratio, repair) for seed in dict.fromkeys(section.seeds)
                  for m, own in repairs.items() for ratio in ratios for repair in own)
    _require_possible(resolved, cells)
    return Plan(resolved, cells, _context(recipe, dense))


def _compared(recipe: Recipe) -> Recipe:
    """The recipe without what a comparison does not do."""
    if not recipe.evaluate.perplexity.enabled:
        raise InputError("evaluate.perplexity.enabled: false, and perplexity is what is compared; "
                         "set it to true")
    return _changed(recipe, {"export": {}, "gates": {}, "bench": {"torch": {"enabled": False}}})


def _changed(recipe: Recipe, sections: Mapping[str, Any]) -> Recipe:
    data = recipe.model_dump(mode="json")
    return recipe_file.build({**data, **sections}, "compare")


def _require_possible(resolved: Resolved, cells: tuple[Cell, ...]) -> None:
    faults: dict[str, None] = {}
    for at in {(CRITERIA[c.method.criterion].refuses, c.method.layers, c.ratio, c.repair): c
               for c in cells}.values():
        try:
            refuse(resolved.under(recipe_of(resolved.recipe, resolved.architecture, at)))
        except InputError as error:
            faults[str(error)] = None
    if faults:
        raise InputError("\n".join(faults))


def recipe_of(recipe: Recipe, arch: Architecture, cell: Cell) -> Recipe:
    """The recipe that makes one cell. Raises InputError where it is not a valid one."""
    data = recipe.model_dump(mode="json")
    own, part = cell.method, cell.method.depth
    prune = {**data["prune"], "ratio": cell.ratio, "target": None, "depth": {},
             "layers": "uniform" if part else own.layers}
    if part:
        prune["depth"] = {part: droppable(arch, recipe.prune, part, cell.ratio)}
    sections: dict[str, Any] = {
        "seed": cell.seed, "prune": prune, "tune": {**data["tune"], "enabled": False},
        "score": {"criterion": own.criterion, "propagation": own.propagation or "bound"}}
    for name, settings in repair_settings(cell.repair, recipe.tune.method).items():
        sections[name] = _laid_over(sections.get(name, data[name]), settings)
    return _changed(recipe, sections)


def _laid_over(data: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A section's data with settings in their places, in the sections within it too."""
    return {**data, **{name: _laid_over(data[name], value) if isinstance(value, dict) else value
                       for name, value in settings.items()}}


def _context(recipe: Recipe, dense: Path) -> dict[str, Any]:
    environment = machine.environment()
    zero_shot = recipe.evaluate.zero_shot
    return {
        "model": sources.fingerprint(dense), "code": environment["code"],
        "libraries": environment["libraries"] | {
            name: machine.version_of(name) for name in ("lm_eval",) if zero_shot.enabled},
        "gpus": [] if recipe.model.device == "cpu" else environment["hardware"]["gpus"],
        "calibration": fingerprints(recipe),
        "test": [text.fingerprint(own.data, test_split(own))
                 for own in test_texts(recipe).values()],
        "tasks": tasks.fingerprint(zero_shot.tasks) if zero_shot.enabled else {}}


def test_texts(recipe: Recipe) -> dict[str, TextSection]:
    """The texts that are measured on, by the name that tables show. Raises InputError where two
    have one."""
    section = recipe.evaluate.perplexity
    found: dict[str, TextSection] = {data: section.model_copy(update={"data": data})
                                     for data in (section.data, *recipe.compare.data)}
    for name in section.texts:
        if name in found:
            raise InputError(f"evaluate.perplexity.texts.{name}: tables show texts by name, and "
                             f"another text's data is {name}; call this one something else")
    return {**found, **section.texts}


def dense_key(wanted: Plan) -> str:
    """A digest of all that the dense model's figures, and the texts' overlaps, depend on."""
    return artifacts.digest({**wanted.context, **_sections(
        wanted.recipe, ("model", "evaluate", "calibration", "tune"))})


def key(wanted: Plan, cell: Cell) -> str:
    """A digest of all that a cell's figures depend on."""
    own = recipe_of(wanted.recipe, wanted.arch, cell)
    found = {**wanted.context, **_sections(own, ("model", "hardware", "calibration", "score",
                                         "evaluate", "seed", *REPAIRS_COMPARED[cell.repair]))}
    found["sections"]["recover"] = own.recover.used
    found["sections"]["prune"] = own.prune.model_dump(exclude={"search", "learned"})
    if cell.method.layers == "learned":
        found["learned"] = own.prune.learned.model_dump()
    # Widths are chosen for the recipe's own repair.
    if own.prune.tries_widths:
        found["searched"] = [own.prune.search.model_dump(), wanted.recipe.recover.used]
    if own.tune.enabled:
        found["sections"]["tune"] = plain(own.tune, WHERE | own.tune.unused)
        found["libraries"] = found["libraries"] | {
            name: machine.version_of(name) for name in STAGES["tune"].libraries}
        found["training"] = text.fingerprint(own.tune.data, training_split(own))
    return artifacts.digest(found)


def _sections(recipe: Recipe, names: tuple[str, ...]) -> dict[str, Any]:
    return {"data": recipe.compare.data,
            "sections": {name: plain(getattr(recipe, name), WHERE)
                                                 for name in names}}


def current(wanted: Plan, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records that this recipe, model and code would give again, in the order of the table:
    those of other seeds, methods and ratios too."""
    found: dict[Cell, dict[str, Any]] = {}
    for record in records:
        cell = cell_of(record)
        if cell is not None and record["key"] == _key_now(wanted, cell):
            found[cell] = record
    methods = {m: n for n, m in enumerate(dict.fromkeys(
        [c.method for c in wanted.cells] + [c.method for c in found]))}
    return [found[cell] for cell in sorted(found, key=lambda c: (
        methods[c.method], c.ratio, list(REPAIRS_COMPARED).index(c.repair), c.seed))]


def _key_now(wanted: Plan, cell: Cell) -> str | None:
    """The cell's key; None where this recipe and model cannot have such a cell."""
    try:
        return key(wanted, cell)
    except InputError:
        return None


def cell_of(record: Mapping[str, Any]) -> Cell | None:
    """The cell that a record measured; None where its names are not known any more."""
    try:
        own = method(record["method"])
    except ValueError:
        return None
    if record["repair"] not in REPAIRS_COMPARED:
        return None
    return Cell(record["seed"], own, record["ratio"], record["repair"])
