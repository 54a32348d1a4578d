"""Measuring the cells of a comparison, with all the work that they share done once.

For each seed one walk scores by all criteria. Each criterion is sliced once per spread and ratio,
and what was sliced is repaired in every way; a model is deleted as soon as it is measured.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from math import lcm
from pathlib import Path
from typing import Any

import torch

from bipdeploy.comparing import records
from bipdeploy.comparing.cells import Cell, Plan, dense_key, key, recipe_of, test_texts
from bipdeploy.data import text, windows
from bipdeploy.data.calibration import calibration_batches, test_split
from bipdeploy.errors import BipdeployError, StageError
from bipdeploy.measuring import tasks, zero_shot
from bipdeploy.measuring.perplexity import forward_of, perplexity
from bipdeploy.model import loading
from bipdeploy.model.activations import keeping
from bipdeploy.model.blocks import BlockWalker, compute_device, compute_dtype
from bipdeploy.model.walk import require_agreement
from bipdeploy.pipeline import pipeline
from bipdeploy.planning.job import Job
from bipdeploy.pruning.criteria.table import CRITERIA
from bipdeploy.recipe.names import REPAIRS_COMPARED
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.running import artifacts, machine
from bipdeploy.running.reporter import Reporter
from bipdeploy.stages import score
from bipdeploy.stages.curves import CURVES
from bipdeploy.stages.evaluate import OVERLAP_LIMIT, check_overlap, window_tokens
from bipdeploy.stages.table import STAGES

Cost = dict[str, float]  # seconds, and peak memory in bytes


@dataclass
class Measured:
    """How many cells were measured, and why others could not be."""

    count: int = 0
    failed: dict[Cell, str] = field(default_factory=dict)


class Meter:
    """Measures models on the same texts and tasks; each text is read and tokenised once."""

    def __init__(self, wanted: Plan, out: Path, reporter: Reporter):
        tuned = any("tune" in REPAIRS_COMPARED[cell.repair] for cell in wanted.cells)
        self.recipe = wanted.recipe.model_copy(update={
            "tune": wanted.recipe.tune.model_copy(update={"enabled": tuned})})
        self.dense, self._out = wanted.dense, out
        self._key, self._reporter = dense_key(wanted), reporter
        self._section = self.recipe.evaluate.perplexity
        self._lengths = {str(w): window_tokens(w, wanted.arch.max_positions)
                         for w in self._section.windows}
        self._device = compute_device(self.recipe.model)
        self._dtype = compute_dtype(self.recipe.model, wanted.resolved.config, self._device)

    @cached_property
    def _texts(self) -> dict[str, tuple[torch.Tensor, dict[str, Any]]]:
        """Token ids by text, with where they came from."""
        found = {}
        for name, own in test_texts(self.recipe).items():
            source = text.read(own.data, test_split(own), own.field, "evaluate.perplexity")
            overlap = check_overlap(self.recipe, source)
            for used, share in overlap.items():
                if share > OVERLAP_LIMIT:
                    self._reporter.note(f"{share:.1%} of {name} also stands in the text of {used}: "
                                        "perplexities are too good; use another text or split")
            ids = windows.leading(source, self.dense, self._section.max_tokens).ids
            found[name] = ids, {
                "split": source.split, "sha256": source.sha256, "tokens": len(ids),
                "overlap": overlap, "windows": self._lengths}
        return found

    @cached_property
    def _tasks(self) -> dict[str, Any]:
        """lm-eval's tasks with their documents; none where zero-shot accuracy is not asked for."""
        section = self.recipe.evaluate.zero_shot
        if not section.enabled:
            return {}
        with zero_shot.quiet():
            return zero_shot.load(tasks.find(section.tasks), section)

    def of_dense(self) -> dict[str, Any]:
        """The dense model's figures, measured once and kept in a file, and the texts'."""
        path = self._out / f"dense-{self._key[:16]}.json"
        if not path.is_file():
            perplexities, answers = self._measure(self.dense)
            artifacts.write_json(path, {
                "perplexity": perplexities, "test": {n: about for n, (_, about)
                                                     in self._texts.items()},
                "dtype": str(self._dtype), "device": str(self._device),
                "answers": {name: vars(own) for name, own in answers.items()}})
        return artifacts.read_json(path)

    def of_pruned(self, folder: Path) -> dict[str, Any]:
        """A pruned model's figures: perplexity by text and window, accuracy beside dense."""
        perplexities, answers = self._measure(folder)
        found: dict[str, Any] = {"perplexity": perplexities}
        if answers:
            dense = {name: zero_shot.Answers(**own)
                     for name, own in self.of_dense()["answers"].items()}
            section = self.recipe.evaluate.zero_shot
            figures, record = zero_shot.summarise({
                task: (dense[task.name], answers[task.name])
                for task in tasks.find(section.tasks)})
            found["accuracy"] = {"figures": figures, "mean": record["mean"]}
        return found

    def _measure(self, folder: Path) -> tuple[dict[str, Any], dict[str, zero_shot.Answers]]:
        model = loading.load_model(folder, self._dtype, self._device,
                                   trust_remote_code=self.recipe.model.trust_remote_code)
        found: dict[str, Any] = {}
        for name, (ids, _) in self._texts.items():
            for window, length in self._lengths.items():
                value = perplexity(forward_of(model), ids, length, self._section.batch)
                found.setdefault(name, {})[window] = {
                    "perplexity": min(value.perplexity, 1e300), "nats": value.nats,
                    "predicted": value.tokens}
        if not self._tasks:
            return found, {}
        job = Job(self.recipe, {}, self._out)
        return found, zero_shot.evaluate(model, self.dense, self._tasks,
                                         self.recipe.evaluate.zero_shot, job, first=False)


def measure(wanted: Plan, meter: Meter, out: Path, reporter: Reporter,
            said: Callable[[str], None] = lambda _: None) -> Measured:
    """Measure every cell that has no record in `out` yet; each is appended when it is done."""
    keys = {cell: key(wanted, cell) for cell in wanted.cells}
    done = Measured()
    began = time.monotonic()

    def missing(cells: Iterable[Cell]) -> list[Cell]:
        known = {record["key"] for record in records.read(out)}
        return [c for c in cells if keys[c] not in known and c not in done.failed]

    def recorded(cell: Cell, record: dict[str, Any]) -> None:
        own = cell.method
        records.append(out, {
            "key": keys[cell], "method": str(own), "criterion": own.criterion,
            "propagation": own.propagation, "layers": own.layers, "ratio": cell.ratio,
            "repair": cell.repair, "seed": cell.seed, **record})
        done.count += 1
        reporter.advance()

    total = len(missing(wanted.cells))
    reporter.total(total, "cells")
    with records.workplace(out) as work:
        for seed, of_seed in groupby(wanted.cells, lambda c: c.seed):
            own = missing(of_seed)
            if not own:
                continue
            scores = _scores(wanted, own, work / "scores")
            spent: dict[Path, dict[str, Cost]] = {}
            for method, of_method in groupby(own, lambda c: c.method):
                for _, of_ratio in groupby(of_method, lambda c: c.ratio):
                    cells = missing(of_ratio)  # another process may have measured some
                    if cells:
                        ranked = scores[_scoring(cells[0])]
                        _ratio(wanted, cells, ranked, spent.setdefault(ranked, {}), work, meter,
                               recorded, done)
                said(f"seed {seed}, {method}: "
                     + _progress(done.count, total, time.monotonic() - began))
            shutil.rmtree(work / "scores")
    return done


def _progress(count: int, total: int, seconds: float) -> str:
    left = (f", about {seconds / count * (total - count) / 60:.0f} left" if 0 < count < total
            else "")
    return f"{count} of {total} cells in {seconds / 60:.1f} minutes{left}"


def _scoring(cell: Cell) -> tuple[str, float | None]:
    """What a cell's scores depend on beside the seed: the ratio where its criterion counts."""
    return cell.method.ranking, cell.ratio if CRITERIA[cell.method.criterion].counts else None


def _scores(wanted: Plan, cells: Sequence[Cell], folder: Path
            ) -> dict[tuple[str, float | None], Path]:
    """Score by all criteria of one seed's cells together; the folder of each by `_scoring`."""
    asked = {_scoring(c): recipe_of(wanted.recipe, wanted.arch, c) for c in cells}
    recipe = next(iter(asked.values()))
    walker = BlockWalker(wanted.resolved.checkpoint, recipe.model)
    drawn, provenance = calibration_batches(recipe, wanted.dense, wanted.arch.max_positions)
    require_agreement(walker, recipe.seed)
    sections = [r.score for r in asked.values()]
    widths = [score.widths_for(wanted.resolved.under(r)) for r in asked.values()]
    size = score.kept_bytes(walker, drawn, sections)
    folder.mkdir()
    with (pipeline.finishing("score"),
          keeping(folder, recipe.calibration.spill, size) as keep):
        walked = score.score_together(walker, drawn, sections, recipe.seed, keep=keep,
                                      widths=widths)
    found = {}
    for number, ((name, own), result) in enumerate(zip(asked.items(), walked, strict=True)):
        found[name] = folder / str(number)
        found[name].mkdir()
        score.write(found[name], own.score, result, provenance, widths[number])
    return found


def _ratio(wanted: Plan, cells: Sequence[Cell], scores: Path, costs: dict[str, Cost], work: Path,
           meter: Meter, recorded: Callable[[Cell, dict[str, Any]], None], done: Measured) -> None:
    """Measure the cells of one method at one ratio: sliced once, repaired in every way. `costs`:
    seconds and peak memory of each stage; those of the curves stay for others of these scores."""
    recipe = {c: recipe_of(wanted.recipe, wanted.arch, c) for c in cells}
    inputs = {"dense": wanted.dense, "score": scores}
    with _failing(cells, done), _temporary(work / "sliced") as sliced:
        # Widths are chosen for the recipe's own repair, whatever is done to them later.
        pruning = recipe[cells[0]].model_copy(update={"recover": wanted.recipe.recover})
        curved = pruning.prune.needs_curves
        if curved:
            curves = scores / "curves"  # beside what they depend on: one for all ratios and layers
            if not (curves / CURVES).is_file():
                curves.mkdir(exist_ok=True)
                with _metered(costs, "curves"):
                    _stage(wanted, "curves", pruning, dict(inputs), curves)
            inputs["curves"] = curves
        with _metered(costs, "prune"):
            _stage(wanted, "prune", pruning, inputs, sliced)
        _require_budget(wanted, sliced, recipe[cells[0]])
        by_repair = sorted(cells, key=lambda c: str(REPAIRS_COMPARED[c.repair]["recover"]))
        for recover, same in groupby(by_repair, lambda c: REPAIRS_COMPARED[c.repair]["recover"]):
            alike = list(same)
            with _failing(alike, done), _temporary(work / "repaired") as repaired:
                made = sliced
                if recover["method"] != "none":
                    with _metered(costs, "recover"):
                        _stage(wanted, "recover", recipe[alike[0]],
                               {"dense": wanted.dense, "sliced": sliced / "model"}, repaired)
                    made = repaired
                for cell in alike:
                    with _failing([cell], done), _tuned(
                            wanted, cell, recipe[cell], made, costs, work / "tuned") as tuned:
                        with pipeline.finishing("evaluate"):
                            figures = meter.of_pruned(tuned / "model")
                        removed = 1 - artifacts.figures([sliced, made])["block_parameters.ratio"]
                        recorded(cell, {"removed": removed, **figures, "costs": {
                            stage: cost for stage, cost in costs.items()
                            if curved or stage != "curves"}})
                    costs.pop("tune", None)
                costs.pop("recover", None)


@contextmanager
def _tuned(wanted: Plan, cell: Cell, recipe: Recipe, made: Path, costs: dict[str, Cost],
           folder: Path) -> Iterator[Path]:
    """The folder whose `model` is measured: what was made, trained where that is asked for."""
    if "tune" not in REPAIRS_COMPARED[cell.repair]:
        yield made
        return
    with _temporary(folder):
        inputs = {name: wanted.dense if name == "dense" else made / "model"
                  for name in STAGES["tune"].needs}
        with _metered(costs, "tune"):
            _stage(wanted, "tune", recipe, inputs, folder)
        yield folder


@contextmanager
def _metered(costs: dict[str, Cost], name: str) -> Iterator[None]:
    """Note what a stage takes."""
    machine.release_memory()
    memory, began = machine.PeakMemory(), time.monotonic()
    yield
    costs[name] = {"seconds": round(time.monotonic() - began, 3), **memory.record()}


def _stage(wanted: Plan, name: str, recipe: Recipe, inputs: dict[str, Path], out: Path) -> None:
    """Run a stage without a manifest: what it makes is deleted soon, so nothing is hashed."""
    try:
        with pipeline.finishing(name):
            STAGES[name].load()(Job(recipe, inputs, out, resolved=wanted.resolved.under(recipe)))
    except OSError as error:
        raise artifacts.unwritable(out, error) from error


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    try:
        yield folder
    finally:
        # What an interrupted training would go on from; the next cell is another one.
        for own in (folder, artifacts.checkpoint_folder(folder)):
            shutil.rmtree(own, ignore_errors=True)


@contextmanager
def _failing(cells: Sequence[Cell], done: Measured) -> Iterator[None]:
    """Keep what one error costs to the cells that need what failed; the others go on."""
    try:
        yield
    except BipdeployError as error:
        for cell in cells:
            done.failed.setdefault(cell, str(error))


def _require_budget(wanted: Plan, sliced: Path, recipe: Recipe) -> None:
    """Stop where a method did not get the same budget, to one rounding unit of every block."""
    arch, section = wanted.arch, recipe.prune
    unit = lcm(section.round_to, recipe.hardware.tensor_parallel) * arch.channel_parameters()
    blocks = range(len(arch.blocks))
    allowed = unit * len(blocks) / sum(arch.block_parameters(i) for i in blocks)
    removed = 1 - artifacts.figures([sliced])["block_parameters.ratio"]
    assert section.ratio is not None  # a cell has its own
    if abs(removed - section.ratio) > allowed:
        raise StageError(f"{removed:.4f} of the parameters is removed, and {section.ratio:g} is "
                         f"asked for: more than one rounding unit ({allowed:.4f}) away, so it "
                         "cannot be compared; lower prune.round_to")
