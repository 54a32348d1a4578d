"""When a stage may be reused: a key of all that its result depends on. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bipdeploy.data import text
from bipdeploy.data.calibration import fingerprints, test_split, training_split
from bipdeploy.measuring import tasks
from bipdeploy.model import sources
from bipdeploy.planning.resolved import Resolved
from bipdeploy.pruning.criteria.table import CRITERIA
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.running import artifacts, machine
from bipdeploy.stages.table import ARTEFACTS, STAGES

# Fields that change no result: where or when things are kept, and what only a plan reads.
WHERE = {"spill", "checkpoint_every", "shape", "gpu"}


def stage_keys(resolved: Resolved) -> dict[str, str]:
    """The key of every stage, and that of the dense model."""
    table = resolved.table
    keys = {"dense": sources.fingerprint(resolved.dense), "profile": table.digest if table else ""}
    for name in STAGES:
        keys[name] = stage_key(name, resolved.recipe, keys)
    return keys


def stage_key(name: str, recipe: Recipe, keys: Mapping[str, str]) -> str:
    """A hash of all that a stage's result depends on: its sections, inputs, code and libraries."""
    stage = STAGES[name]
    upstream = {part.split("/")[0] for artefact in stage.needs
                for part in ARTEFACTS.get(artefact, (artefact,))}
    environment = machine.environment()
    sections = stage.read(recipe)
    if name == "score" and CRITERIA[recipe.score.criterion].counts:
        sections |= STAGES["prune"].read(recipe)
    parts: dict[str, Any] = {
        "stage": name, "code": environment["code"],
        "libraries": {**environment["libraries"],
                      **{library: machine.version_of(library) for library in stage.libraries}},
        "sections": {name: plain(value, WHERE) for name, value in sections.items()
                     if name != "tune" or recipe.tune.enabled},
        "inputs": {n: keys[n] for n in sorted(upstream) if n in keys}}
    if "calibration" in sections:
        parts["calibration"] = fingerprints(recipe)
    if "evaluate" in stage.sections:
        parts["test"] = [text.fingerprint(own.data, test_split(own))
                         for own in recipe.evaluate.perplexity.every.values()]
        if recipe.evaluate.zero_shot.enabled:
            parts["tasks"] = tasks.fingerprint(recipe.evaluate.zero_shot.tasks)
    if "tune" in stage.sections and recipe.tune.enabled:
        parts["training"] = text.fingerprint(recipe.tune.data, training_split(recipe))
    if stage.timed:
        parts["hardware"] = environment["hardware"]
    if "prune" in sections and (target := recipe.prune.target):
        if target.timed:
            parts["profile"] = keys.get("profile")
        if target.kind == "memory":  # the biases that a repair adds count
            parts["repair"] = recipe.recover.method
    return artifacts.digest(parts)


def intact(folder: Path, key: str) -> bool:
    """Whether a stage's folder was made from the same inputs, and all of its files are there."""
    manifest = artifacts.read_manifest(folder)
    if manifest is None or manifest.get("key") != key:
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == size
               for name, size in manifest["sizes"].items())


def plain(value: Any, without: set[str] | None = None) -> Any:
    """Recipe values as JSON data, without some fields."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", exclude=without)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value


def local_texts(recipe: Recipe) -> list[Path]:
    """The files here that a run reads as text."""
    named = (*(own.source for own in recipe.calibration.sources.values()), recipe.tune.data,
             *(own.data for own in recipe.evaluate.perplexity.every.values()))
    return [path for path in (Path(data).expanduser() for data in dict.fromkeys(named))
            if path.is_file()]
