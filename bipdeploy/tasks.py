"""The multiple-choice tasks that zero-shot accuracy is measured on, by name. Imports no lm_eval.

A task is one of lm-eval's, built in, or defined by YAML files in a folder of the user's. All three
are files of the same form, which are read here as far as names and metrics go.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml

from bipdeploy.errors import InputError, did_you_mean

Metric = Literal["acc", "acc_norm"]

# The metric that LLM-Pruner, FLAP and those after them report. `acc_norm` divides an answer's
# log-likelihood by its length in characters, `acc` does not. (LLM-Pruner's own pages do not say;
# these are the ones that reproduce its table.)
METRICS: dict[str, Metric] = {
    "boolq": "acc", "piqa": "acc", "hellaswag": "acc_norm", "winogrande": "acc",
    "arc_easy": "acc", "arc_challenge": "acc_norm", "openbookqa": "acc_norm"}
GROUPS: dict[str, tuple[str, ...]] = {"llm_bip_7": tuple(METRICS)}
BUILTIN = {"builtin:pydocs_choice": Path(__file__).parent / "data" / "pydocs_choice.yaml"}
KNOWN = (*METRICS, *GROUPS, *BUILTIN)

LIBRARIES = ("lm_eval", "accelerate")  # lm-eval wraps a model by means of accelerate

_NAME = re.compile(r"^task:[ \t]*[\"']?([\w.-]+)", re.MULTILINE)
_READ = {".yaml", ".py", ".json", ".jsonl", ".csv", ".parquet", ".txt"}


@dataclass(frozen=True)
class Task:
    """A task under lm-eval's name, the file that defines it, and the metric that is reported."""

    name: str
    file: Path
    metric: Metric


def fault(spec: str) -> str | None:
    """What is wrong with a name in a recipe; None where nothing is, as far as files here tell."""
    if spec.startswith("builtin:"):
        return None if spec in BUILTIN else f"no built-in task {spec!r}{did_you_mean(spec, KNOWN)}"
    if not _is_path(spec):
        return None
    path = Path(spec).expanduser()
    if not path.exists():
        return f"there is no file or folder {spec!r}; give a YAML file or a folder of them"
    return None if _local(spec) else (f"{spec!r} defines no task; a .yaml file in it has to say "
                                      "`task: NAME`")


def names(specs: Sequence[str]) -> list[str]:
    """lm-eval's names of the tasks that a recipe lists, each once; groups in full."""
    found: dict[str, None] = {}
    for spec in specs:
        if spec in GROUPS:
            found |= dict.fromkeys(GROUPS[spec])
        elif spec in BUILTIN or _is_path(spec):
            found |= dict.fromkeys(_local(spec))
        else:
            found[spec] = None
    return list(found)


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
        elif spec in BUILTIN or _is_path(spec):
            for name, path in _local(spec).items():
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
        if spec in BUILTIN:
            found[spec] = f"{_hash([BUILTIN[spec]])}:python-{sys.version.split()[0]}"
        elif _is_path(spec):
            path = Path(spec).expanduser()
            files = path.rglob("*") if path.is_dir() else path.parent.glob("*")
            found[spec] = _hash(sorted(p for p in files if p.suffix in _READ and p.is_file()))
    return found


def _is_path(spec: str) -> bool:
    return "/" in spec or spec.startswith(("~", ".")) or spec.endswith(".yaml")


def _local(spec: str) -> dict[str, Path]:
    path = BUILTIN.get(spec, Path(spec).expanduser())
    return _scan([path] if path.is_file() else sorted(path.rglob("*.yaml")))


@lru_cache(maxsize=1)
def _installed() -> dict[str, Path]:
    """lm-eval's own tasks. Ten thousand files: looking for one line takes half a second, while
    lm-eval's own index takes twelve and loads the data library."""
    package = importlib.util.find_spec("lm_eval")
    places = package.submodule_search_locations if package else None
    return _scan(sorted((Path(places[0]) / "tasks").rglob("*.yaml"))) if places else {}


def _scan(files: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in files:
        if match := _NAME.search(path.read_text(encoding="utf-8", errors="replace")):
            found.setdefault(match[1], path.resolve())
    return found


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
