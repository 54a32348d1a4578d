"""The trials of a sweep: which combinations there are, and the recipe of each. Loads no torch."""

from __future__ import annotations

import json
import random
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from bipdeploy.errors import InputError, RecipeError, did_you_mean
from bipdeploy.model import sources
from bipdeploy.model.families import Architecture
from bipdeploy.pipeline import pipeline
from bipdeploy.pipeline.keys import plain, stage_key
from bipdeploy.pipeline.preflight import refuse
from bipdeploy.planning.resolved import Resolved, resolve
from bipdeploy.pruning.depth import droppable
from bipdeploy.recipe import file as recipe_file
from bipdeploy.recipe.methods import Method, method
from bipdeploy.recipe.names import repair_settings
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.running import artifacts, machine
from bipdeploy.stages.table import STAGES

# Fields that are no part of a single run, or that a trial is given.
_NOT_VARIED = ("name", "compare", "sweep")
# What makes two models of one budget equally fast, as far as a recipe tells.
_SHAPE = ("prune", "hardware", "model", "export", "bench")

_NOTHING = ("sweep: nothing varies; give ratios, criteria, layers, repairs or fields two different "
            "values or more")

Choice = Mapping[str, Any]  # axis (`ratios`, …, or a field's name) → one of its values


@dataclass(frozen=True)
class Trial:
    """One run of a sweep. `settings`: what `--set` takes to make it from the swept recipe; `key`: a
    digest of all that its figures depend on; `rivals`: the same for trials that only differ in
    quality."""

    name: str
    label: str
    settings: tuple[str, ...]
    recipe: Recipe
    key: str
    rivals: str

    def command(self, recipe: str) -> str:
        """The plain run that gives the same figures."""
        return shlex.join(["bipdeploy", "run", recipe, *(
            word for setting in self.settings for word in ("--set", setting))])


@dataclass(frozen=True)
class Plan:
    """All that is to be run."""

    recipe: Recipe
    dense: Path
    trials: tuple[Trial, ...]


def plan(recipe: Recipe) -> Plan:
    """The trials of a recipe's section `sweep`. Raises InputError for all that cannot be run."""
    _require_fields(recipe)
    resolved = pipeline.fetched(resolve(recipe))
    made: dict[str, Trial] = {}
    faults: dict[str, None] = {}
    for choice in _choices(recipe):
        try:
            own = _trial(recipe, resolved, choice)
            made.setdefault(_effect(own.recipe), own)
        except RecipeError as error:
            faults |= dict.fromkeys(error.faults)
        except InputError as error:
            faults |= dict.fromkeys(str(error).split("\n"))
    if faults:
        raise RecipeError("sweep", list(faults))
    if len(made) < min(2, recipe.sweep.samples or 2):
        raise InputError(_NOTHING)
    return Plan(recipe, resolved.dense, tuple(made.values()))


def check_offline(recipe: Recipe) -> None:
    """All of `plan` that needs no network, where the section says what to vary."""
    section = recipe.sweep
    if not (section.ratios or section.criteria or section.layers or section.repairs
            or section.fields):
        return
    if sources.is_local(recipe.model.id):
        plan(recipe)
    else:
        _require_fields(recipe)


def _require_fields(recipe: Recipe) -> None:
    """Refuse names under `sweep.fields` that are no fields of a recipe. Raises RecipeError."""
    faults = []
    for name in recipe.sweep.fields:
        parts = tuple(name.split("."))
        for at, part in enumerate(parts):
            known = [f for f in recipe_file.fields(parts[:at]) if at or f not in _NOT_VARIED]
            if part not in known:
                faults.append(f"sweep.fields.{name}: unknown field{did_you_mean(part, known)}")
                break
    if faults:
        raise RecipeError("sweep", faults)


def _choices(recipe: Recipe) -> Iterator[Choice]:
    """Every combination, or as many as are asked for; each once."""
    section = recipe.sweep
    axes: dict[str, list[Any]] = {
        "ratios": sorted(section.ratios), "criteria": section.criteria, "layers": section.layers,
        "repairs": section.repairs, **section.fields}
    axes = {name: list({json.dumps(v): v for v in values}.values())
            for name, values in axes.items() if values}
    if max(map(len, axes.values()), default=0) < 2:
        raise InputError(_NOTHING)
    found = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    if section.samples is not None and section.samples < len(found):
        drawn = list(range(len(found)))
        random.Random(recipe.seed).shuffle(drawn)
        found = [found[number] for number in sorted(drawn[:section.samples])]
    yield from found


def _trial(recipe: Recipe, resolved: Resolved, choice: Choice) -> Trial:
    """The trial of a combination; `recipe` as it was given, of which each is resolved anew. Raises
    InputError where it cannot be run."""
    arch = resolved.architecture
    settings = tuple(f"{name}={_written(value)}"
                     for name, value in _settings(recipe, arch, choice).items())
    label = ", ".join(_words(axis, value) for axis, value in choice.items())
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", label.replace("%", "")).strip("-.")[:80]
    name = f"{slug or 'trial'}-{artifacts.digest(settings)[:6]}"
    data = {**recipe.model_dump(mode="json"), "name": name, "compare": {}, "sweep": {}}
    own = recipe_file.build(data, "sweep", list(settings))
    if not own.evaluate.perplexity.enabled:
        raise InputError("evaluate.perplexity.enabled: false, and perplexity is what a sweep "
                         "weighs against speed; set it to true")
    of_own = resolved.under(own)
    if own.model != recipe.model:
        of_own = pipeline.fetched(of_own)
    refuse(of_own)
    own = of_own.recipe
    return Trial(name, label, settings, own, _key(recipe, own, of_own.dense),
                 artifacts.digest([plain(getattr(own, s)) for s in _SHAPE]))


def _settings(recipe: Recipe, arch: Architecture, choice: Choice) -> dict[str, Any]:
    """The fields that a combination sets. Raises InputError where two of its parts set one."""
    found: dict[str, Any] = {}
    ratio = choice.get("ratios", recipe.prune.share)
    if "ratios" in choice:
        found["prune.ratio"] = ratio
        if recipe.prune.target:
            found["prune.target"] = None
    elif recipe.prune.ratio and any(f"{f}.".startswith("prune.target.") for f in choice):
        found["prune.ratio"] = None
    if "criteria" in choice:
        own = method(choice["criteria"])
        found["score.criterion"] = own.criterion
        if own.propagation:
            found["score.propagation"] = own.propagation
    if "layers" in choice:
        part = Method("", layers=choice["layers"]).depth
        if part and ratio is None:
            raise InputError(f"sweep.layers: {choice['layers']} needs a ratio, and the recipe asks "
                             "for another budget; give sweep.ratios")
        found["prune.layers"] = "uniform" if part else choice["layers"]
        found["prune.depth"] = {part: droppable(arch, recipe.prune, part, ratio)} if part else {}
    if "repairs" in choice:
        found |= ({"tune.enabled": False} if recipe.tune.enabled else {}) | _flat(
            repair_settings(choice["repairs"], recipe.tune.method))
    for name in recipe.sweep.fields:
        twice = [f for f in found if f"{f}.".startswith(f"{name}.")
                 or f"{name}.".startswith(f"{f}.")]
        if twice:
            raise InputError(f"sweep.fields.{name}: another part of the sweep sets {twice[0]} "
                             "too; leave one of them out")
        found[name] = choice[name]
    return found


def _written(value: Any) -> str:
    """A value as `--set` reads it: a word as it is, all else as JSON."""
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", value)
    # YAML takes words such as `no` for something else.
    return value if plain and yaml.safe_load(value) == value else json.dumps(value)


def _flat(sections: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in sections.items():
        found |= (_flat(value, f"{at}{name}.") if isinstance(value, dict)
                  else {f"{at}{name}": value})
    return found


def _words(axis: str, value: Any) -> str:
    if axis == "ratios":
        return f"{value * 100:g}%"
    if axis in ("criteria", "layers", "repairs"):
        return str(value)
    return f"{axis} {value if isinstance(value, str) else json.dumps(value)}"


def _effect(recipe: Recipe) -> str:
    """The same for recipes that give the same model: fields that a repair does not read differ."""
    return artifacts.digest({**recipe.model_dump(mode="json", exclude={"name"}),
                             "recover": recipe.recover.used})


def _key(swept: Recipe, own: Recipe, dense: Path) -> str:
    # Without what only a node of its own knows: times measured for a target, and the hardware that
    # the key of `bench` names; on one machine the hardware counts.
    keys = {"dense": sources.fingerprint(dense), "profile": ""}
    for name in STAGES:
        keys[name] = stage_key(name, own, keys)
    local = swept.sweep.engine.address is None
    return artifacts.digest({
        "evaluate": keys["evaluate"],
        "sections": [plain(own.bench), plain(own.gates)],
        "hardware": machine.hardware() if local else None})
