"""Running one trial: the pipeline in its own folder, with rough perplexities on the way."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bipdeploy.errors import BipdeployError, StageError
from bipdeploy.pipeline import pipeline
from bipdeploy.pipeline.keys import stage_keys
from bipdeploy.planning.resolved import Resolved, resolve
from bipdeploy.recipe import file as recipe_file
from bipdeploy.running import artifacts, machine
from bipdeploy.stages.table import inputs_of
from bipdeploy.sweeping import sharing

TRIALS, RECORD = "trials", "trial.json"
# Stages whose folders may be the same in several trials: no name goes into their keys.
_SHARED = ("score", "curves", "prune", "recover", "tune")
# What a rough figure is of, in order; only the last says what a trial will be.
POINTS = {"prune": 1, "recover": 2, "repaired": 3}
# Where the model lies after a stage: the artefact that the next one reads.
_MADE = {"prune": ("recover", "sliced"), "recover": ("tune", "repaired"),
         "tune": ("export", "pruned")}

# Is told the number of a point, and ln(perplexity / dense) there.
Told = Callable[[int, float], None]


@dataclass(frozen=True)
class Task:
    """A trial as it is handed to another process, perhaps on another machine. `code`: the
    version that must run there; `limit`: of the perplexity ratio; `windows`: of rough figures."""

    name: str
    key: str
    recipe: dict[str, Any]
    out: str
    cwd: str
    code: str
    limit: float | None
    windows: int

    @property
    def folder(self) -> Path:
        return Path(self.out) / TRIALS / self.name


def run(task: Task, told: Told = lambda point, loss: None) -> None:
    """Run a trial and write its record: finished, stopped (and why) or failed (and why)."""
    began = time.monotonic()
    _require_place(task)
    rough: dict[str, float] = {}
    try:
        record = _run(task, told, rough)
    except (BipdeployError, OSError) as error:
        record = {"state": "failed", "why": str(error)}
    write(task.folder, {"key": task.key, **record, "rough": rough,
                        "rough_windows": task.windows,
                        "seconds": round(time.monotonic() - began, 3)})


def write(folder: Path, record: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(folder / RECORD, record)


def read(folder: Path, key: str) -> dict[str, Any] | None:
    """A trial's record; None where there is none of this key, or where it did not end."""
    if not (folder / RECORD).is_file():
        return None
    record = artifacts.read_json(folder / RECORD)
    return record if record.get("key") == key else None


def _require_place(task: Task) -> None:
    """Refuse a node that is not set up like the one that started the sweep."""
    node = platform.node()
    if not Path(task.out).is_dir():
        raise StageError(f"{node} does not see {task.out}; give an --out on storage that all "
                         "nodes share")
    if machine.code_version() != task.code:
        raise StageError(f"{node} has bipdeploy {machine.code_version()}, and the sweep was "
                         f"started with {task.code}; install the same on all nodes")
    if Path(task.cwd).is_dir():
        os.chdir(task.cwd)  # relative paths of the recipe


def _run(task: Task, told: Told, rough: dict[str, float]) -> dict[str, Any]:
    recipe = recipe_file.build(task.recipe, task.name)
    runs = Path(task.out) / TRIALS
    resolved = pipeline.timed(pipeline.fetched(resolve(recipe)), sharing.turn)
    keys = stage_keys(resolved)
    for name in _SHARED:
        with sharing.once(name, keys[name], task.folder):
            pipeline.run(recipe, runs, until=name, reporting=sharing.turn)
        point = "repaired" if name == ("tune" if recipe.tune.enabled else "recover") else name
        if point in POINTS:
            loss = _loss(task, resolved, keys, name)
            rough[point] = math.exp(min(loss, 700.0))
            if point == "repaired" and _over(rough[point], task.limit):
                return _stopped(name, rough[point], f"rough perplexity ratio {rough[point]:.3g} "
                                                    f"is over {task.limit:g}")
            told(POINTS[point], loss)
    ratio = pipeline.run(recipe, runs, until="evaluate",
                         reporting=sharing.turn).figures["perplexity.ratio"]
    if _over(ratio, task.limit):
        return _stopped("evaluate", ratio, f"perplexity ratio {ratio:.3g} is over {task.limit:g}")
    result = pipeline.run(recipe, runs, reporting=sharing.turn)
    bench = artifacts.read_json(task.folder / "bench" / "bench.json").get("torch", {})
    return {"state": "finished", "figures": result.figures, "spread": bench.get("spread", {}),
            "failed_gates": [gate["figure"] for gate in result.failed_gates],
            "hardware": machine.hardware()}


def _over(ratio: float, limit: float | None) -> bool:
    return limit is not None and ratio > limit


def _stopped(after: str, ratio: float, why: str) -> dict[str, Any]:
    return {"state": "stopped", "rule": "limit", "after": after, "ratio": ratio, "why": why}


def _loss(task: Task, resolved: Resolved, keys: dict[str, str], stage: str) -> float:
    """ln(perplexity / dense) of what a stage made, on a few windows."""
    from bipdeploy.sweeping import rough

    reader, artefact = _MADE[stage]
    dense = resolved.dense
    model = inputs_of(reader, task.folder, dense)[artefact]
    made_by = model.parent.name  # an earlier stage, where this one changed nothing
    kept = task.folder.parent / ".rough"
    with sharing.turn("rough"), pipeline.finishing("rough perplexity"):
        base, own = (rough.nats(resolved, folder, task.windows, key, kept)
                     for folder, key in ((dense, keys["dense"]), (model, keys[made_by])))
    return own - base
