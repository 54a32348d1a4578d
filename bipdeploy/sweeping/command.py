"""A sweep from its recipe to its files. Loads Ray only where something is to be run."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bipdeploy.errors import InputError
from bipdeploy.pipeline import pipeline
from bipdeploy.pipeline.keys import local_texts, plain
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.recipe.sweep import SweepSection
from bipdeploy.running import artifacts, machine, places
from bipdeploy.running.reporter import Reporter
from bipdeploy.sweeping import plot, results, running, trials
from bipdeploy.sweeping.running import TRIALS, Task
from bipdeploy.sweeping.trials import Trial

DATA, TABLE, PAGE, PICTURE = "sweep.json", "sweep.csv", "sweep.md", "sweep.png"
_BEHIND = "rough perplexity ratio {ratio:.3g} is behind the median of its rivals"


@dataclass(frozen=True)
class Swept:
    """A sweep's folder, what `sweep.json` in it holds, and how many trials were run now."""

    folder: Path
    data: dict[str, Any]
    ran: int
    reused: int


def sweep(recipe: Recipe, out: Path, reporter: Reporter, command: str, source: str = "RECIPE",
          said: Callable[[str], None] = lambda _: None, *, verbose: bool = False) -> Swept:
    """Run what the recipe's section `sweep` asks for, then write tables and the plot.

    Trials that `out` holds to their end are not run again; others go on from their last stage.
    `source` names the recipe's file in commands. Raises InputError before anything is run.
    """
    pipeline.require_one_process()
    for package in ("ray", "pandas", "pyarrow"):  # ray alone comes without what ray.tune needs
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{package} is not installed, and a sweep runs on Ray Tune; "
                             "`pip install 'bipdeploy[sweep]'`")
    wanted = trials.plan(recipe)
    places.require_apart(out, [wanted.dense, *local_texts(recipe)], holding=False)
    try:
        (out / TRIALS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise artifacts.unwritable(out, error) from error
    missing = [t for t in wanted.trials if not _ended(recipe.sweep, _read(out, t))]
    if missing:
        _run(recipe, wanted.trials, missing, out, reporter, said, verbose)
    found = results.with_fronts([_shown(out, t, source) for t in wanted.trials])
    data = {"command": command, "model": recipe.model.id, "environment": machine.environment(),
            "recipe": plain(recipe), "benches": results.BENCHES, "trials": found}
    _write(out, data)
    return Swept(out, data, len(missing), len(wanted.trials) - len(missing))


def _read(out: Path, trial: Trial) -> dict[str, Any] | None:
    return running.read(out / TRIALS / trial.name, trial.key)


def _ended(section: SweepSection, record: dict[str, Any] | None) -> bool:
    """Whether a trial needs no more running: it finished, or what stopped it still would."""
    if record is None or record["state"] == "failed":
        return False
    if record["state"] == "finished":
        return True
    if record["rule"] == "limit":
        return (section.max_perplexity_ratio is not None
                and record["ratio"] > section.max_perplexity_ratio
                and (record["after"] == "evaluate"
                     or record["rough_windows"] == section.rough_windows))
    return section.stop == "median" and record["rough_windows"] == section.rough_windows


def _run(recipe: Recipe, every: Sequence[Trial], missing: Sequence[Trial], out: Path,
         reporter: Reporter, said: Callable[[str], None], verbose: bool) -> None:
    from bipdeploy.sweeping import engine

    section = recipe.sweep
    known = [(t, record) for t in every if t not in missing and (record := _read(out, t))
             and record["rough_windows"] == section.rough_windows]
    scheduler = engine.Rivals(
        {t.name: t.rivals for t in missing},
        [(t.rivals, math.log(record["rough"]["repaired"])) for t, record in known],
        section.stop == "median")
    named = {t.name: t for t in missing}
    reporter.total(len(missing), "trials")

    def ended(name: str, error: str | None) -> None:
        trial = named[name]
        if name in scheduler.behind:
            _record_behind(out, trial, scheduler.behind[name], section.rough_windows)
        elif _read(out, trial) is None:
            running.write(out / TRIALS / name, {
                "key": trial.key, "state": "failed", "rough": {},
                "why": error or "its process ended without a record"})
        reporter.advance()
        said(f"{trial.label}: {results.outcome(_read(out, trial) or {})}")

    engine.run(recipe, [_task(recipe, t, out) for t in missing], scheduler, out / ".ray", ended,
               verbose)


def _task(recipe: Recipe, trial: Trial, out: Path) -> Task:
    section = recipe.sweep
    (out / TRIALS / trial.name / running.RECORD).unlink(missing_ok=True)
    return Task(trial.name, trial.key, trial.recipe.model_dump(mode="json"), str(out.absolute()),
                str(Path.cwd()), machine.code_version(), section.max_perplexity_ratio,
                section.rough_windows)


def _record_behind(out: Path, trial: Trial, loss: float, windows: int) -> None:
    """The record of a trial that Ray stopped: it could not write one itself."""
    ratio = math.exp(min(loss, 700.0))
    last = "tune" if trial.recipe.tune.enabled else "recover"
    running.write(out / TRIALS / trial.name, {
        "key": trial.key, "state": "stopped", "rule": "median", "after": last, "ratio": ratio,
        "why": _BEHIND.format(ratio=ratio), "rough": {"repaired": ratio},
        "rough_windows": windows})


def _shown(out: Path, trial: Trial, source: str) -> dict[str, Any]:
    record = _read(out, trial) or {}
    return {"name": trial.name, "label": trial.label, "settings": list(trial.settings),
            "command": trial.command(source), "folder": str(out / TRIALS / trial.name),
            **{name: value for name, value in record.items() if name != "key"}}


def _write(out: Path, data: dict[str, Any]) -> None:
    artifacts.write_json(out / DATA, data)
    found = data["trials"]
    try:
        (out / PAGE).write_text(results.markdown(data), encoding="utf-8")
        (out / TABLE).write_text(results.as_csv(found), encoding="utf-8")
        if any(t["state"] == "finished" for t in found):
            (out / PICTURE).write_bytes(plot.draw(found))
        else:
            (out / PICTURE).unlink(missing_ok=True)  # that of an earlier sweep
    except OSError as error:
        raise artifacts.unwritable(out, error) from error
