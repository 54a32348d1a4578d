"""Trials on Ray Tune: a cluster, a process per trial, the median rule. Imports Ray when loaded."""

from __future__ import annotations

import io
import logging
import os
import shutil
import socket
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

# Read when Ray is imported.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # relative paths of a recipe stay what they are
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # each trial keeps its own record
os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new kind prints a banner at verbosity 0
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C ends the sweep; it can be taken up again

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, MedianStoppingRule, TrialScheduler

from bipdeploy.errors import InputError, StageError
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.recipe.sweep import EngineSection
from bipdeploy.sweeping import running
from bipdeploy.sweeping.running import POINTS, Task

_OBJECTS = 80 << 20  # bytes of Ray's object store, about its minimum: trials hand over files
_DIED = ("its process died: it was killed, by hand or for want of memory; the same command runs it "
         "again from its last stage")
_CONNECT = 5.0  # seconds; Ray itself would try for minutes, then end the process


class Rivals(FIFOScheduler):
    """Ray's median rule, among trials that only differ in quality.

    Over all trials it would stop the smaller, faster models: their perplexity is always higher.
    `groups`: trial → its rivals' common digest. `known`: groups of trials that an earlier sweep has
    run, each with ln(perplexity / dense). `behind`: that of the trials that were stopped.
    """

    def __init__(self, groups: Mapping[str, str], known: Sequence[tuple[str, float]],
                 active: bool = True):
        super().__init__()
        self._groups, self._active = groups, active
        # No trial is ever paused for others to catch up: that would end its process.
        self._rules: dict[str, MedianStoppingRule] = defaultdict(lambda: MedianStoppingRule(
            time_attr="point", metric="loss", mode="min", grace_period=POINTS["repaired"],
            min_samples_required=3, min_time_slice=POINTS["repaired"]))
        for number, (group, loss) in enumerate(known):
            self._rules[group].on_trial_complete(
                None, number, {"point": POINTS["repaired"], "loss": loss})
        self.behind: dict[str, float] = {}
        self._judged: set[tuple[str, int]] = set()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        name = trial.config["trial"]
        at = (name, result.get("point", 0))
        # Ray hands the last result over once more when a trial has ended by itself.
        if not self._active or at in self._judged:
            return TrialScheduler.CONTINUE
        self._judged.add(at)
        rule = self._rules[self._groups[name]]
        decision = rule.on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            self.behind[name] = result["loss"]
        return decision


def run(recipe: Recipe, tasks: Sequence[Task], scheduler: Rivals, store: Path,
        ended: Callable[[str, str | None], None], verbose: bool) -> None:
    """Run trials; each writes its own record, but for those that the scheduler stops or that die.

    `ended` is told every trial's name once, and the error where its process died. `store`: a
    folder for Ray's own records, gone afterwards. Raises InputError where the cluster cannot be
    reached, or has no node that a trial fits on.
    """
    engine, told = recipe.sweep.engine, set()

    def tell(name: str, error: BaseException | None = None) -> None:
        if name not in told:
            told.add(name)
            died = isinstance(error, ray.exceptions.RayActorError)
            ended(name, _DIED if died else _why(error) if error else None)

    # Ray prints to stdout, which is for results here.
    with (cluster(engine, verbose),
          redirect_stdout(sys.stderr if verbose else io.StringIO())):
        resources = _resources(recipe)
        try:
            results = tune.Tuner(
                tune.with_resources(partial(_trial, {task.name: task for task in tasks}),
                                    resources),
                param_space={"trial": tune.grid_search([task.name for task in tasks])},
                tune_config=tune.TuneConfig(
                    scheduler=scheduler, max_concurrent_trials=engine.concurrent,
                    trial_dirname_creator=lambda trial: trial.trial_id),
                run_config=tune.RunConfig(name="sweep", storage_path=str(store.absolute()),
                                          verbose=2 if verbose else 0,
                                          callbacks=[_Completed(tell)])).fit()
        finally:
            shutil.rmtree(store, ignore_errors=True)
    for number, task in enumerate(tasks):
        tell(task.name, results[number].error)


class _Completed(tune.Callback):
    """Tells the name of every trial that did not die."""

    def __init__(self, tell: Callable[[str], None]):
        self._tell = tell

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray keeps a copy to take its own record up again, which is never done here

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._tell(trial.config["trial"])


def _trial(tasks: Mapping[str, Task], config: Mapping[str, str]) -> None:
    running.run(tasks[config["trial"]],
                lambda point, loss: tune.report({"point": point, "loss": loss}))


def _why(error: BaseException) -> str:
    last = [line for line in str(error).splitlines() if line.strip()][-1:]
    return textwrap.shorten("".join(last) or type(error).__name__, 200)


@contextmanager
def cluster(engine: EngineSection, verbose: bool) -> Iterator[None]:
    """A connection to Ray: one that is open, the cluster asked for, or one started here."""
    if ray.is_initialized():
        yield
        return
    level = logging.INFO if verbose else logging.CRITICAL  # errors are in the trials' records
    logging.getLogger("ray").setLevel(level)
    options: dict[str, Any] = {"logging_level": level, "log_to_driver": verbose}
    if engine.address is None:
        options |= {"address": "local", "include_dashboard": False,
                    "object_store_memory": _OBJECTS,
                    "num_cpus": engine.concurrent * cpus(engine)}
    else:
        _require_listening(engine.address)
        options["address"] = engine.address
    try:
        ray.init(**options)
    except (Exception, SystemExit) as error:  # Ray raises its base classes here
        if engine.address is None:
            raise StageError(f"Ray could not start on this machine: {_why(error)} Run again when "
                             "it is less busy; BIPDEPLOY_DEBUG=1 shows the traceback") from error
        raise InputError(f"sweep.engine.address: no Ray cluster at {engine.address!r} lets this "
                         f"user in: {_why(error)}; see that it runs, and that Ray's own "
                         "authentication is set up here, too") from error
    try:
        yield
    finally:
        ray.shutdown()


def _require_listening(address: str) -> None:
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()) or "/" in host:
        raise InputError(f"sweep.engine.address: {address!r} is neither HOST:PORT nor auto; "
                         "`ray start --head` says which it is")
    try:
        socket.create_connection((host, int(port)), _CONNECT).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"sweep.engine.address: {address} cannot be reached: "
                         f"{getattr(error, 'strerror', None) or error}; start Ray there with "
                         "`ray start --head`, or leave the address out") from error


def cpus(engine: EngineSection) -> int:
    """Cores of each trial."""
    return engine.cpus or max(1, (os.cpu_count() or 1) // engine.concurrent)


def _resources(recipe: Recipe) -> dict[str, float]:
    """What a trial takes. Raises InputError where no node has as much."""
    engine = recipe.sweep.engine
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = engine.gpus
    if gpus is None:
        gpus = float(recipe.model.device != "cpu" and any(node.get("GPU", 0) for node in nodes))
    wanted = {"cpu": float(cpus(engine)), "gpu": gpus}
    if not any(all(node.get(name.upper(), 0) >= count for name, count in wanted.items())
               for node in nodes):
        raise InputError(f"sweep.engine: no node has {wanted['cpu']:g} cpus and {gpus:g} gpus for "
                         "a trial; lower cpus or gpus")
    return wanted
