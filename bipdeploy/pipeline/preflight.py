"""What is refused before the first expensive step. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from bipdeploy.data import text
from bipdeploy.errors import InputError
from bipdeploy.exporters.table import EXPORTERS
from bipdeploy.measuring import tasks
from bipdeploy.measuring.table import ENGINES
from bipdeploy.model import agreement, sources, weights
from bipdeploy.model.families import Architecture, architecture
from bipdeploy.ort import installed
from bipdeploy.planning.resolved import Resolved, of_config, resolve
from bipdeploy.planning.targets import TARGETS
from bipdeploy.pruning.allocation import narrowest
from bipdeploy.pruning.criteria.table import CRITERIA
from bipdeploy.recipe.evaluate import text_field
from bipdeploy.recipe.model import ShapeSection
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.stages.repairs import REPAIRS
from bipdeploy.stages.table import STAGES
from bipdeploy.table import Row


def refuse(resolved: Resolved, *, here: bool = True) -> None:
    """Refuse what cannot work before the first expensive step. Raises InputError.

    `here` is False where nothing will run: what is installed on this machine plays no part then.
    """
    recipe = resolved.recipe
    if recipe.model.shape:
        _same_shape(resolved.architecture, recipe.model.shape)
    if resolved.times and not resolved.table:  # judged once the times are measured
        narrowest(resolved.architecture, recipe.prune, tensor_parallel=resolved.parallel)
    else:
        _ = resolved.uniform
    check_texts(recipe)
    if here:
        check_tasks(recipe)
    for row in _rows(recipe):
        row.refuse(resolved)
    if here:
        for name, exporter in EXPORTERS.items():
            if getattr(recipe.export, name).enabled:
                installed.require(*exporter.needs)
        if recipe.export.onnx.enabled:
            installed.require_for(recipe.model.device, recipe.export.onnx.dtype)


def _rows(recipe: Recipe) -> Iterator[Row]:
    """The rows of all tables that a recipe names."""
    yield CRITERIA[recipe.score.criterion]
    if recipe.prune.target:
        yield TARGETS[recipe.prune.target.kind]
    yield REPAIRS[recipe.recover.method]
    yield from STAGES.values()
    for table, section in ((EXPORTERS, recipe.export), (ENGINES, recipe.bench)):
        yield from (row for name, row in table.items() if getattr(section, name).enabled)


def _same_shape(found: Architecture, shape: ShapeSection) -> None:
    stated = architecture(shape.config)
    for name, mine, real in (
            ("model_type", stated.family.model_type, found.family.model_type),
            *((n, getattr(stated, n), getattr(found, n))
              for n in ("hidden", "head_dim", "vocabulary", "tied", "max_positions")),
            ("blocks", len(stated.blocks), len(found.blocks)),
            *((n, getattr(stated.blocks[0], n), getattr(found.blocks[0], n))
              for n in ("heads", "kv_heads", "intermediate"))):
        if mine != real:
            raise InputError(f"model.shape.{name}: {mine} is not what the model's config.json "
                             f"says, {real}; correct it, or leave model.shape out")


def check_texts(recipe: Recipe) -> None:
    """Refuse texts that are neither known by name nor files here. Raises InputError for all."""
    named = {name: own.source for name, own in recipe.calibration.sources.items()}
    if recipe.evaluate.perplexity.enabled:
        named |= {f"{text_field(name)}.data": own.data
                  for name, own in recipe.evaluate.perplexity.every.items()}
    if recipe.tune.enabled:
        named["tune.data"] = recipe.tune.data
    listed = [*named.items(), *(("compare.data", data) for data in recipe.compare.data)]
    faults = [f"{name}: {fault}" for name, data in listed if (fault := text.check(data))]
    tune = recipe.tune
    if tune.enabled and tune.format == "alpaca" and text.is_running_text(tune.data):
        faults.append(f"tune.data: {tune.data} has no columns, which tune.format alpaca reads; "
                      "give a .jsonl or .parquet file that has, or alpaca")
    if faults:
        raise InputError("\n".join(faults))


def check_tasks(recipe: Recipe) -> None:
    """Refuse tasks that lm-eval, as installed here, cannot run. Raises InputError for all."""
    if recipe.evaluate.zero_shot.enabled:
        tasks.find(recipe.evaluate.zero_shot.tasks)


def check_offline(recipe: Recipe) -> Resolved | None:
    """All of `refuse` that needs no network: a model on the hub is not looked at. Returns the
    recipe with the model's sizes, where these are known."""
    if sources.is_local(recipe.model.id):
        resolved = resolve(recipe)
        refuse(resolved)
        # What is no plain checkpoint is written out first.
        if resolved.folder and not (recipe.model.dequantize or weights.wrapper(resolved.folder)):
            agreement.require(resolved.checkpoint)
        return resolved
    check_texts(recipe)
    check_tasks(recipe)
    shape = recipe.model.shape
    return of_config(recipe, shape.config) if shape else None
