"""Finding the tasks that a recipe names: their files, their metrics, what changes when they do.

Imports no lm_eval: a task is a YAML file in lm-eval's form, which is read as far as that needs.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml

from bipdeploy.errors import InputError, did_you_mean
from bipdeploy.recipe.tasks import GROUPS, KNOWN, fault, is_path, local, scan
from bipdeploy.running import machine
from bipdeploy.table import Row, by_name

Metric = Literal["acc", "acc_norm"]

# The metric that LLM-Pruner, FLAP and those after them report. `acc_norm` divides an answer's
# log-likelihood by its length in characters, `acc` does not. (LLM-Pruner's own pages do not say;
# these are the ones that reproduce its table.)
METRICS: dict[str, Metric] = {
    "boolq": "acc", "piqa": "acc", "hellaswag": "acc_norm", "winogrande": "acc",
    "arc_easy": "acc", "arc_challenge": "acc_norm", "openbookqa": "acc_norm"}
LIBRARIES = ("lm_eval", "accelerate")  # lm-eval wraps a model by means of accelerate

_READ = {".yaml", ".py", ".json", ".jsonl", ".csv", ".parquet", ".txt"}


@dataclass(frozen=True)
class Builtin(Row):
    """A task that is on every machine. `needs`: packages; the function gives lm-eval its questions;
    `file` defines it."""

    file: Path


TASKS = by_name(
    Builtin("builtin:pydocs_choice", LIBRARIES, None, "bipdeploy.data.pydocs_choice:splits",
            machine.PACKAGE / "data" / "pydocs_choice.yaml"),
)


@dataclass(frozen=True)
class Task:
    """A task under lm-eval's name, the file that defines it, and the metric that is reported."""

    name: str
    file: Path
    metric: Metric


def find(specs: Sequence[str]) -> list[Task]:
    """Every task that a recipe lists. Raises InputError for those that cannot be run, and where
    lm-eval is not installed."""
    for library in LIBRARIES:
        if importlib.util.find_spec(library) is None:
            raise InputError(f"evaluate.zero_shot: {library} is not installed; "
                             "`pip install 'bipdeploy[eval]'`")
    files: dict[str, Path] = {}
    faults = []
    for spec in specs:
        if message := fault(spec):
            faults.append(message)
        elif spec in TASKS or is_path(spec):
            for name, path in _files(spec).items():
                if files.setdefault(name, path) != path:
                    faults.append(f"{name!r} is defined by {files[name]} and by {path}; keep one")
        else:
            for name in GROUPS.get(spec, (spec,)):
                if name in _installed():
                    files.setdefault(name, _installed()[name])
                else:
                    close = difflib.get_close_matches(name, _installed(), n=1)
                    faults.append(f"lm-eval has no task {name!r} (a group's tasks are listed one "
                                  f"by one){did_you_mean(name, [*close, *KNOWN])}")
    found = []
    for name, path in files.items():
        try:
            found.append(Task(name, path, _metric(name, path)))
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("\n".join(f"evaluate.zero_shot.tasks: {message}" for message in faults))
    return found


def fingerprint(specs: Sequence[str]) -> dict[str, str]:
    """What changes when a task does: a hash of its files. lm-eval's own go by its version."""
    found = {}
    for spec in specs:
        if spec in TASKS:
            found[spec] = f"{_hash([TASKS[spec].file])}:python-{sys.version.split()[0]}"
        elif is_path(spec):
            path = Path(spec).expanduser()
            files = path.rglob("*") if path.is_dir() else path.parent.glob("*")
            found[spec] = _hash(sorted(p for p in files if p.suffix in _READ and p.is_file()))
    return found


def _files(spec: str) -> dict[str, Path]:
    return scan([TASKS[spec].file]) if spec in TASKS else local(spec)


@lru_cache(maxsize=1)
def _installed() -> dict[str, Path]:
    """lm-eval's own tasks. Ten thousand files: looking for one line takes half a second, while
    lm-eval's own index takes twelve and loads the data library."""
    package = importlib.util.find_spec("lm_eval")
    places = package.submodule_search_locations if package else None
    return scan(sorted((Path(places[0]) / "tasks").rglob("*.yaml"))) if places else {}


def _metric(name: str, path: Path) -> Metric:
    if name in METRICS:
        return METRICS[name]
    settings = _settings(path)
    if "class" in settings:
        raise InputError(f"{name!r} is a Python class, and only tasks that YAML defines are taken")
    if settings.get("output_type") != "multiple_choice":
        raise InputError(f"{name!r} is no multiple-choice task, so it has no accuracy of this kind "
                         f"(output_type {settings.get('output_type')!r})")
    listed = settings.get("metric_list")
    metrics = {m.get("metric") for m in listed} if listed else {"acc", "acc_norm"}
    if "acc_norm" in metrics:
        return "acc_norm"
    if "acc" in metrics:
        return "acc"
    raise InputError(f"{name!r} reports neither acc nor acc_norm")


class _Loader(yaml.SafeLoader):
    """Reads lm-eval's YAML without importing the functions that it names."""


_Loader.add_constructor("!function", lambda loader, node: str(node.value))


def _settings(path: Path, within: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A task's settings, with those of the files that it includes below its own."""
    if path in within:
        raise InputError(f"{path} includes itself")
    try:
        own = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not readable YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(own, dict):
        raise InputError(f"{path} is no mapping of settings")
    included = own.pop("include", [])
    merged: dict[str, Any] = {}
    for name in [included] if isinstance(included, str) else included:
        merged |= _settings((path.parent / name).resolve(), (*within, path))
    return merged | own


def _hash(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path}\0".encode() + path.read_bytes())
    return digest.hexdigest()
