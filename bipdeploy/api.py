"""The Python API: a whole recipe, or one stage on plain paths. The command line calls these.

    import bipdeploy
    result = bipdeploy.run("recipes/quickstart.yaml", overrides=["prune.ratio=0.4"])
    result.figures["perplexity.ratio"]

    scores = bipdeploy.score("builtin:pico", "out/scores", settings=["score.criterion=wanda_sp"])
    pruned = bipdeploy.prune("builtin:pico", scores, "out/pruned", ratio=0.3)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from bipdeploy.comparing.command import Compared
from bipdeploy.comparing.command import compare as compared
from bipdeploy.errors import InputError
from bipdeploy.model import agreement, sources
from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.pipeline import pipeline
from bipdeploy.pipeline.keys import local_texts
from bipdeploy.pipeline.preflight import refuse
from bipdeploy.planning import footprint, latency
from bipdeploy.planning import plan as planning
from bipdeploy.planning.latency import Table
from bipdeploy.planning.plan import Plan
from bipdeploy.planning.resolved import Resolved, resolve, resolved_at
from bipdeploy.recipe import file as recipe_file
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.running import artifacts, places
from bipdeploy.running.reporter import Reporter, Silent
from bipdeploy.stages.table import ARTEFACTS, STAGES
from bipdeploy.sweeping.command import Swept
from bipdeploy.sweeping.command import sweep as swept

PathLike = str | Path


def run(recipe: Recipe | PathLike, overrides: Sequence[str] = (), runs: PathLike = "runs", *,
        force: bool = False, start: str | None = None, until: str | None = None,
        reporting: pipeline.Reporting | None = None) -> pipeline.RunResult:
    """Run a recipe (an object or a YAML file) with `section.field=value` overrides."""
    return pipeline.run(_recipe(recipe, overrides), Path(runs), force=force, start=start,
                        until=until, reporting=reporting)


def plan(recipe: Recipe | PathLike, overrides: Sequence[str] = (), runs: PathLike = "runs") -> Plan:
    """What a recipe will make and cost, from sizes alone. `runs` is where its finished run may be.
    Raises InputError as `run` would, but for what is not installed here."""
    resolved = resolve(_recipe(recipe, overrides))
    refuse(resolved, here=False)
    folder = Path(runs) / resolved.recipe.name
    return planning.make(resolved, pipeline.finished_widths(resolved, folder), folder)


def compare(recipe: Recipe | PathLike, out: PathLike, overrides: Sequence[str] = (),
            reporter: Reporter | None = None, *, command: str = "bipdeploy.compare",
            said: Callable[[str], None] = lambda _: None) -> Compared:
    """Measure the methods of a recipe's section `compare` against each other; records that `out`
    holds already are reused. `said` is told, in a line, about every method that is done."""
    return compared(_recipe(recipe, overrides), Path(out), reporter or Silent(), command, said)


def sweep(recipe: Recipe | PathLike, out: PathLike, overrides: Sequence[str] = (),
          reporter: Reporter | None = None, *, command: str = "bipdeploy.sweep",
          said: Callable[[str], None] = lambda _: None, verbose: bool = False) -> Swept:
    """Run every trial of a recipe's section `sweep` on Ray Tune; those that `out` holds to their
    end are reused. `said` is told, in a line, how every trial ended."""
    source = "RECIPE" if isinstance(recipe, Recipe) else str(recipe)
    return swept(_recipe(recipe, overrides), Path(out), reporter or Silent(), command, source, said,
                 verbose=verbose)


def _recipe(recipe: Recipe | PathLike, overrides: Sequence[str]) -> Recipe:
    if not isinstance(recipe, Recipe):
        return recipe_file.load(recipe, list(overrides))
    if overrides:
        raise ValueError("overrides go with a recipe file; change a Recipe with model_copy")
    return recipe


def score(model: str, out: PathLike, settings: Sequence[str] = (),
          reporter: Reporter | None = None, *, force: bool = False) -> Path:
    """Score every group of a model; returns the folder with `scores.safetensors`."""
    return _stage("score", model, {}, out, settings, reporter, force)


def curves(model: str, scores: PathLike, out: PathLike, settings: Sequence[str] = (),
           reporter: Reporter | None = None, *, force: bool = False) -> Path:
    """Measure what each width of each part of a model costs its output, whatever the budget;
    returns the folder with `curves.json`."""
    return _stage("curves", model, {"score": Path(scores)}, out,
                  ["prune.layers=searched", *settings], reporter, force)


def prune(model: str, scores: PathLike, out: PathLike, ratio: float | None = None,
          settings: Sequence[str] = (), reporter: Reporter | None = None, *,
          curves: PathLike | None = None, force: bool = False) -> Path:
    """Slice a model by its scores; returns the folder that holds the smaller `model`.

    Without a `ratio` the settings give `prune.target`. With `curves` widths are searched, unless
    the settings say otherwise; a search without them measures its own.
    """
    inputs, searched = {"score": Path(scores)}, []
    if curves is not None:
        inputs["curves"], searched = Path(curves), ["prune.layers=searched"]
    return _stage("prune", model, inputs, out, [
        f"prune.ratio={'null' if ratio is None else ratio}", *searched, *settings], reporter, force)


def recover(model: str, pruned: PathLike, out: PathLike, settings: Sequence[str] = (),
            reporter: Reporter | None = None, *, force: bool = False) -> Path:
    """Repair a sliced model beside its dense origin; returns the folder that holds `model`."""
    return _stage("recover", model, {"sliced": sources.model_folder(str(pruned))}, out, settings,
                  reporter, force)


def tune(model: str, pruned: PathLike, out: PathLike, settings: Sequence[str] = (),
         reporter: Reporter | None = None, *, force: bool = False) -> Path:
    """Train a pruned model, by `tune.method`; returns the folder that holds `model`."""
    return _stage("tune", model, {"repaired": sources.model_folder(str(pruned))}, out,
                  ["tune.enabled=true", *settings], reporter, force)


def export(pruned: PathLike, out: PathLike, settings: Sequence[str] = (),
           reporter: Reporter | None = None, *, force: bool = False) -> Path:
    """Write and verify the export targets of a model; returns their parent folder."""
    return _stage("export", str(pruned), {"pruned": sources.model_folder(str(pruned))}, out,
                  settings, reporter, force)


def evaluate(model: str, pruned: PathLike, out: PathLike, settings: Sequence[str] = (),
             reporter: Reporter | None = None, *, force: bool = False) -> Path:
    """Measure a pruned model's perplexity and accuracy beside the dense one; returns the folder of
    figures."""
    return _stage("evaluate", model, {"exported": sources.model_folder(str(pruned))}, out,
                  settings, reporter, force)


def bench(model: str, pruned: PathLike, out: PathLike, settings: Sequence[str] = (),
          reporter: Reporter | None = None, *, force: bool = False) -> Path:
    """Time a pruned model against the dense one; returns the folder of figures."""
    folder = sources.model_folder(str(pruned))
    return _stage("bench", model, {"exported": folder, "served": folder}, out, settings, reporter,
                  force)


def gate(folders: Sequence[PathLike], out: PathLike, settings: Sequence[str],
         reporter: Reporter | None = None, *, force: bool = False) -> Path:
    """Judge the figures in stage folders by `gates.…` settings; returns the folder of verdicts."""
    inputs = {str(number): Path(folder) for number, folder in enumerate(folders)}
    for folder in inputs.values():
        if not (folder / artifacts.FIGURES).is_file():
            raise InputError(f"{folder} holds no {artifacts.FIGURES}; give the folders that "
                             "`bipdeploy evaluate`, `bench` or `prune` wrote")
    return _stage("gate", "builtin:pico", inputs, out, settings, reporter, force)


def report(run_folder: PathLike, out: PathLike, reporter: Reporter | None = None, *,
           force: bool = False) -> Path:
    """Write the report of a run anew from its artefacts; returns the folder with `report.html`."""
    folder = Path(run_folder)
    manifest = artifacts.read_json(folder / artifacts.MANIFEST)
    if "recipe" not in manifest:
        raise InputError(f"{folder} is not a run's folder; give the one above it")
    recipe = recipe_file.build(manifest["recipe"], str(folder / artifacts.MANIFEST))
    inputs = {name: folder / name for name in STAGES["report"].needs}
    return _write("report", recipe, inputs, Path(out), reporter, force)


def profile(source: PathLike, settings: Sequence[str] = (), *, batch: int | None = None,
            context: int | None = None, cache: PathLike | None = None, force: bool = False,
            reporter: Reporter | None = None) -> Table:
    """Time the parts of a model, or of a recipe's, on this machine, or take them from the cache.

    Batch and context: as given, else those of the recipe's target, else of its `bench.torch`.
    """
    path = Path(source)
    recipe = (recipe_file.load(path, list(settings)) if path.suffix in {".yaml", ".yml"}
              else _stage_recipe(str(source), settings))
    resolved = resolve(recipe)
    target, bench = recipe.prune.target, recipe.bench.torch
    timed = target if target and target.timed else None
    key = latency.key(resolved.config, resolved.architecture, recipe.model,
                      batch or (timed.batch if timed else bench.batch),
                      context or (timed.tokens if timed else bench.prompt_tokens),
                      recipe.prune.query_heads)
    cache = Path(cache) if cache else None
    found = None if force else latency.lookup(key, cache)
    if found is None:
        from bipdeploy.measuring import profile as measuring

        with pipeline.finishing("profile"):
            found = measuring.obtain(key, resolved.config, resolved.architecture, recipe.model,
                                     reporter, cache, force=force)
    return found


def _stage(name: str, model: str, inputs: dict[str, Path], out: PathLike,
           settings: Sequence[str], reporter: Reporter | None, force: bool) -> Path:
    recipe, resolved = _stage_recipe(model, settings), None
    pipeline.require_one_process()
    if "dense" in STAGES[name].needs:
        inputs["dense"] = sources.dense_folder(recipe.model)
        resolved = resolved_at(recipe, inputs["dense"])
        recipe = resolved.recipe
        agreement.require(resolved.checkpoint)
    for artefact in ARTEFACTS:
        if artefact in inputs:
            agreement.require(Checkpoint(inputs[artefact]))
    return _write(name, recipe, inputs, Path(out), reporter, force, resolved)


def _write(name: str, recipe: Recipe, inputs: Mapping[str, Path], out: Path,
           reporter: Reporter | None, force: bool, resolved: Resolved | None = None) -> Path:
    """Run a stage into a folder of the user's choice, where nothing is lost by it."""
    reporter = reporter or Silent()
    read = [*inputs.values(), *local_texts(recipe)]
    removed = places.require_place(out, name, read, force=force)
    run = out.parent if artifacts.read_run(out.parent) else None
    with places.alone(out), places.alone(run, inside=True) if run else nullcontext():
        _require_space(name, recipe, inputs, out, resolved)
        if removed:
            reporter.note(removed)
        pipeline.run_stage(name, recipe, inputs, out, "", reporter, resolved)
    return out


def _require_space(name: str, recipe: Recipe, inputs: Mapping[str, Path], out: Path,
                   resolved: Resolved | None) -> None:
    """Refuse a stage that writes a model where there is no room for it. Raises StageError."""
    if name == "prune" and resolved:
        footprint.require_space(resolved, resolved.uniform, [name], out, "--out")
    elif name in ("recover", "tune", "export"):  # what they write is as large as what they read
        made = resolved_at(recipe, next(inputs[n] for n in ("sliced", "repaired", "pruned")
                                        if n in inputs))
        footprint.require_space(made, made.architecture.blocks, [name], out, "--out")


def _stage_recipe(model: str, settings: Sequence[str]) -> Recipe:
    base = {"name": "stage", "model": {"id": model}, "prune": {"ratio": 0.5}}
    return recipe_file.build(base, "--set", list(settings))
