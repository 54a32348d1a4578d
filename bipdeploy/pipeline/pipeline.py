"""A run from its recipe to its result: resolve, refuse, reserve space, then each stage.

Imports no torch: a run in which every stage is reused never loads it.
"""

from __future__ import annotations

import os
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bipdeploy.errors import BipdeployError, InputError, StageError, did_you_mean, says_no_memory
from bipdeploy.model import agreement, sources
from bipdeploy.model.families import BlockWidths
from bipdeploy.pipeline.keys import intact, local_texts, plain, stage_keys
from bipdeploy.pipeline.preflight import refuse
from bipdeploy.planning import footprint, outlook
from bipdeploy.planning.job import Job
from bipdeploy.planning.resolved import Resolved, resolve, resolved_at
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.running import artifacts, machine, places
from bipdeploy.running.reporter import Reporter, Silent
from bipdeploy.stages.table import STAGES, Stage, inputs_of

# Opens the reporter of a stage; the command line shows a progress bar.
Reporting = Callable[[str], AbstractContextManager[Reporter]]


@dataclass
class RunResult:
    """What a run did: the folder, the stages it ran and reused, their figures and failed gates."""

    folder: Path
    ran: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def folders(self) -> dict[str, Path]:
        """The stages' folders. Raises StageError where another run has replaced one since."""
        found = {name: self.folder / name for name in self.stages}
        for name, folder in found.items():
            artifacts.require_key(folder, self.keys[name])
        return found

    @property
    def figures(self) -> dict[str, float]:
        return artifacts.figures(list(self.folders.values()))

    @property
    def failed_gates(self) -> list[dict[str, Any]]:
        if "gate" not in self.stages:
            return []
        gates = artifacts.read_json(self.folders["gate"] / "gates.json")["gates"]
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
    resolved = resolve(recipe)
    refuse(resolved)  # before gigabytes are fetched
    resolved = fetched(resolved)
    folder = runs / recipe.name
    _writable(folder)
    with places.alone(folder, "--runs", inside=True):
        resolved = timed(resolved, reporting)
        keys = stage_keys(resolved)
        due = _due(names, folder, keys, force, start)
        _require_places(resolved, folder, due)
        footprint.require_space(resolved, resolved.uniform, due, folder)
        recipe = resolved.recipe
        for name in due[1:]:  # the first says it itself, at once
            STAGES[name].rehearse(resolved)
        result = RunResult(folder, keys=keys)
        notes = [*_of_others(folder, due), *outlook.notes(resolved, due)]
        for name in names:
            if name not in due:
                result.reused.append(name)
                continue
            with (reporting(name) if reporting else nullcontext(Silent())) as reporter:
                for note in notes if name == due[0] else ():
                    reporter.note(note)
                inputs = inputs_of(name, folder, resolved.dense)
                run_stage(name, recipe, inputs, folder / name, keys[name], reporter, resolved,
                          {folder / made: keys[made] for made in _made_by(inputs, folder)})
            result.ran.append(name)
            _write_run_manifest(resolved, folder, keys)
    return result


def _made_by(inputs: Mapping[str, Path], folder: Path) -> set[str]:
    """The stages of a run in whose folders inputs lie."""
    return {path.relative_to(folder).parts[0] for path in inputs.values()
            if path.is_dir() and path.is_relative_to(folder)} & STAGES.keys()


def _require_places(resolved: Resolved, folder: Path, due: Sequence[str]) -> None:
    """Refuse to replace what no earlier run made, or what this one reads. Raises InputError."""
    stages = (artifacts.read_manifest(folder) or {}).get("stages")
    if (folder / artifacts.MANIFEST).is_file() and stages is None:
        raise InputError(f"{folder / artifacts.MANIFEST} was not written by bipdeploy; give "
                         "another folder with --runs, or the recipe another name")
    read = [resolved.dense, *local_texts(resolved.recipe)]
    for name in due:
        places.require_place(folder / name, name, read, option="--runs",
                             known=(stages or {}).get(name, {}).get("sha256", {}))


def fetched(resolved: Resolved) -> Resolved:
    """With all of the model here, and its weights as its config says. Raises InputError."""
    recipe = resolved.recipe
    folder = sources.dense_folder(recipe.model)
    if folder != resolved.folder:  # the recipe's shape stood in, or the hub has another by now
        resolved = resolved_at(recipe, folder)
        refuse(resolved)
    agreement.require(resolved.checkpoint)
    return resolved


def timed(resolved: Resolved, reporting: Reporting | None = None) -> Resolved:
    """With the times that the target needs, measured now where no earlier run did. Raises
    InputError where the target cannot be met."""
    if resolved.times and not resolved.table:
        from bipdeploy.measuring import profile

        with (reporting("profile") if reporting else nullcontext(Silent())) as reporter, (
                finishing("profile")):
            resolved = profile.timed(resolved, reporter)
    _ = resolved.uniform
    return resolved


def _due(names: Sequence[str], folder: Path, keys: Mapping[str, str], force: bool,
         start: str | None) -> list[str]:
    """Those of the stages that will run; the others are reused."""
    first = names.index(start) if start else len(names)
    return [name for number, name in enumerate(names)
            if force or number >= first or not intact(folder / name, keys[name])]


def _of_others(folder: Path, due: Sequence[str]) -> list[str]:
    """A line where stages of a run run again since another version of this code made them."""
    own = machine.environment()["code"]
    made: dict[str, list[str]] = {}
    for name in due:
        environment = (artifacts.read_manifest(folder / name) or {}).get("environment", {})
        if (code := environment.get("code", own)) != own:
            made.setdefault(code, []).append(name)
    return [f"{', '.join(names)}: made by bipdeploy {code}, and run again by {own}"
            for code, names in made.items()]


def finished_widths(resolved: Resolved, folder: Path) -> tuple[BlockWidths, ...] | None:
    """The widths that the prune stage made of exactly this recipe, where they depend on scores and
    it has run in `folder`.

    That it is the same model is told from hashes of its files, as when a stage is reused.
    """
    made = folder / "prune"
    if (not resolved.scored or resolved.folder is None
            or artifacts.read_manifest(made) is None):
        return None
    if not intact(made, stage_keys(resolved)["prune"]):
        return None
    return tuple(BlockWidths(b["heads"], b["kv_heads"], b["intermediate"])
                 for b in artifacts.read_json(made / "kept.json")["blocks"])


def require_one_process() -> None:
    """Refuse to be one of several processes that all do the same. Raises InputError."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise InputError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: bipdeploy was started once "
                         "for every process (by accelerate launch or torchrun); start it once, "
                         "without these, and set tune.processes")


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
              reporter: Reporter, resolved: Resolved | None = None,
              made: Mapping[Path, str] | None = None) -> None:
    """Run one stage into `out`: written whole, with its manifest, or not at all.

    `made`: the keys that folders of earlier stages have to have, before and after. Raises
    StageError where one has not: what was read is then of two runs.
    """
    machine.release_memory()
    memory, began = machine.PeakMemory(), time.time()
    with artifacts.writing(out) as partial:
        for folder, own in (made or {}).items():
            artifacts.require_key(folder, own)
        with finishing(name):
            STAGES[name].load()(Job(recipe, dict(inputs), partial, reporter, resolved))
        for folder, own in (made or {}).items():
            artifacts.require_key(folder, own)
        artifacts.write_json(partial / artifacts.MANIFEST, {
            "stage": name, "key": key, "seed": recipe.seed,
            "sections": {s: plain(own) for s, own in STAGES[name].read(recipe).items()},
            "inputs": {n: str(p) for n, p in inputs.items()},
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
            "seconds": round(time.time() - began, 3), **memory.record(),
            "notes": getattr(reporter, "notes", []),
            "environment": machine.environment(),
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


def _out_of_memory(name: str) -> StageError:
    advice = {"profile": "lower the batch or the context that are asked for",
              **{stage: row.smaller for stage, row in STAGES.items()}}
    return StageError(f"stage {name} ran out of memory; {advice.get(name, Stage.smaller)}")


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise artifacts.unwritable(folder, error) from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write to {folder}: permission denied; give another folder with "
                         "--runs")


def _write_run_manifest(resolved: Resolved, folder: Path, keys: Mapping[str, str]) -> None:
    """What the run's folder holds of this recipe; stages that it made outdated are left out."""
    stages = {}
    for name in STAGES:
        manifest = artifacts.read_manifest(folder / name)
        if manifest and manifest.get("key") == keys[name]:
            stages[name] = {k: manifest[k] for k in (
                "key", "started", "seconds", "peak_memory_bytes", "peak_gpu_memory_bytes", "notes",
                "sha256") if k in manifest}
    artifacts.write_json(folder / artifacts.MANIFEST, {
        "recipe": plain(resolved.recipe), "model": str(resolved.dense),
        "environment": machine.environment(), "stages": stages})
