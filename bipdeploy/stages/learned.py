"""Widths by training, for stage `prune`: every group gets a multiplier and a standing, the budget
is met anew at every step, and what the model then predicts is trained towards the dense model.

The multiplier is part of the model, and is written into the weights in the end; the standing only
says which groups stay. Weights are frozen. With a mask of what stays, learned through it, as in
GRASPrune (arXiv 2604.19398) and DDP (arXiv 2603.08065).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bipdeploy.data.calibration import calibration_windows
from bipdeploy.errors import InputError, StageError
from bipdeploy.model import cost, loading, sources
from bipdeploy.model.blocks import compute_device, compute_dtype
from bipdeploy.model.families import BlockWidths
from bipdeploy.planning.job import Job
from bipdeploy.planning.resolved import Resolved
from bipdeploy.pruning import projection
from bipdeploy.pruning.kept import BlockScores, Kept
from bipdeploy.pruning.projection import Budget, Part, Values
from bipdeploy.recipe.prune import JUDGEMENTS, LearnedSection
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.running import artifacts, machine
from bipdeploy.running.reporter import Reporter
from bipdeploy.tuning import checkpoints
from bipdeploy.tuning.checkpoints import State
from bipdeploy.tuning.data import Windows, hold_back, rows_of_step
from bipdeploy.tuning.multipliers import Multiplied, columns, straight_through

SAVED_EVERY = 20  # steps; two numbers for a group are soon written
LIBRARIES = ("torch", "transformers", "tokenizers")
MULTIPLIER, STANDING = "multiplier", "standing"


@dataclass(frozen=True)
class Learned:
    """`columns`: by block, what each input of its two output projections is multiplied by, where
    that is learned: [H*e] of "heads", [F] of "ffn". `record`: for kept.json."""

    widths: list[BlockWidths]
    kept: list[Kept]
    columns: list[dict[str, torch.Tensor]]
    record: dict[str, Any]


@dataclass(frozen=True)
class Task:
    """All that the result depends on, and `checkpoint`, the folder that survives a kill.

    `places`: where the criterion puts each group, from 0 to 1. `identity`: a digest of all this.
    """

    section: LearnedSection
    seed: int
    budget: Budget
    places: Values
    training: Windows
    held_back: Windows
    checkpoint: Path
    identity: str


def rehearse(resolved: Resolved) -> None:
    """Refuse, before the scores are made, what training could not start with."""
    if resolved.recipe.prune.layers == "learned":
        assert resolved.folder is not None
        read_windows(resolved.recipe, resolved.folder)


def learned(job: Job, scores: Sequence[BlockScores], *, comparable: bool) -> Learned:
    """The widths, groups and multipliers that training finds for the budget."""
    task, provenance = prepare(job, scores, comparable=comparable)
    checkpoints.start(task.checkpoint, task.identity, job.reporter)
    recipe, arch = job.recipe, task.budget.arch
    device = compute_device(recipe.model)
    dtype = compute_dtype(recipe.model, job.dense.config, device)
    if dtype == torch.float16:
        dtype = torch.bfloat16  # gradients of whole models leave float16's range
    model = loading.load_model(job.dense.dense, dtype, device,
                               trust_remote_code=recipe.model.trust_remote_code)
    learner = Learner(task, Multiplied(model.requires_grad_(False), arch), device)
    state = learner.run(job.reporter)
    widths, masks = learner.projected(state.best)
    del learner, model
    machine.release_memory()
    by_block: list[dict[str, torch.Tensor]] = [{} for _ in arch.blocks]
    for part in task.places:
        by_block[part.block][part.part] = columns(
            state.best[f"{part.name}.{MULTIPLIER}"], arch, part.block)
    budget, target = task.budget, job.dense.target
    losses = [loss for _, loss in state.history]
    return Learned(widths, projection.kept(arch, widths, masks), by_block, {"learned": {
        "data": provenance, "steps": state.step, "best_step": state.best_step,
        "tokens": state.tokens, "epochs": state.step * task.section.batch / len(task.training),
        "seconds": round(state.seconds, 3), "device": str(device), "dtype": str(dtype),
        "history": [{"step": step, "divergence": loss} for step, loss in state.history],
        "divergence": {"before": losses[0], "after": min(losses)},
        "budget": {"unit": target.unit if target else "parameters", "asked": budget.limit,
                   "met": budget.cost.whole(widths), "dense": budget.cost.whole(arch.blocks)}}})


def prepare(job: Job, scores: Sequence[BlockScores], *, comparable: bool
            ) -> tuple[Task, dict[str, Any]]:
    """The task, its text read and cut, and where that came from."""
    recipe, section = job.recipe, job.recipe.prune.learned
    windows, provenance = read_windows(recipe, job.dense.dense)
    training, held = hold_back(windows, section.held_back, recipe.seed)
    budget = budget_of(job.dense)
    places = projection.places(scores, list(budget.parts()), comparable=comparable,
                               single=recipe.prune.query_heads)
    identity = artifacts.digest({
        "prune": recipe.prune.model_dump(mode="json"), "seed": recipe.seed,
        "parallel": job.dense.parallel, "limit": budget.limit,
        "model": recipe.model.model_dump(mode="json"),
        "dense": sources.fingerprint(job.dense.dense),
        "places": [[part.name, own.tolist()] for part, own in places.items()],
        "windows": provenance["windows_sha256"], "device": compute_device(recipe.model).type,
        "code": machine.code_version(),
        "libraries": {name: machine.version_of(name) for name in LIBRARIES}})
    return Task(section, recipe.seed, budget, places, training, held,
                artifacts.checkpoint_folder(job.out), identity), provenance


def budget_of(resolved: Resolved) -> Budget:
    """What a recipe asks for, in its own unit."""
    arch, target = resolved.architecture, resolved.target
    if target:
        return Budget(arch, resolved.allowed, target.cost, target.limit)
    share, spent = resolved.recipe.prune.share, cost.parameters(arch)
    assert share is not None
    return Budget(arch, resolved.allowed, spent, spent.whole(arch.blocks) * (1 - share))


def read_windows(recipe: Recipe, model: Path) -> tuple[Windows, dict[str, Any]]:
    """The windows that are trained on and those held back, and where they come from. Raises
    InputError where there are too few."""
    section = recipe.prune.learned
    tokens = section.tokens or recipe.calibration.tokens
    ids, provenance = calibration_windows(
        recipe, model, tokens, section.steps * section.batch + section.held_back)
    if len(ids) < section.held_back + section.batch:
        raise InputError(f"prune.learned: the calibration text gives {len(ids)} windows of "
                         f"{tokens} tokens, and held_back + batch need {section.held_back} + "
                         f"{section.batch}; lower them or prune.learned.tokens, or give a longer "
                         "text")
    return Windows(ids, ids), provenance


class Learner:
    """The model, what is trained of every part, and its optimiser."""

    def __init__(self, task: Task, model: Multiplied, device: torch.device):
        self.task, self.model, self.device = task, model, device
        state = checkpoints.load(task.checkpoint)
        start = state.values if state else {
            f"{part.name}.{name}": torch.full_like(own, value, dtype=torch.float32)
            for part, own in task.places.items()
            for name, value in ((MULTIPLIER, 1.0), (STANDING, 0.0))}
        self.trained = {name: torch.nn.Parameter(value.to(device))
                        for name, value in start.items()}
        self.optimizer = torch.optim.AdamW(list(self.trained.values()), weight_decay=0.0,
                                           lr=task.section.learning_rate)
        self.state = state or State({}, {})
        for name, parameter in self.trained.items() if self.state.first else ():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.state.step)),
                "exp_avg": self.state.first[name].to(device),
                "exp_avg_sq": self.state.second[name].to(device)}

    def run(self, reporter: Reporter) -> State:
        """Step until the last one. The state's `best` is what diverges least of what was judged,
        the start included."""
        state, steps = self.state, self.task.section.steps
        every = max(1, steps // JUDGEMENTS)
        began = checkpoints.begin(state, steps, reporter)
        if not state.history:
            self._judge()
        while state.step < steps:
            self._step()
            state.step += 1
            if state.step % every == 0 or state.step == steps:
                self._judge()
            state.seconds = time.monotonic() - began
            if state.step % SAVED_EVERY == 0 or state.step == steps:
                self._save()
            reporter.advance()
        return state

    def projected(self, trained: Mapping[str, torch.Tensor]
                  ) -> tuple[list[BlockWidths], dict[Part, torch.Tensor]]:
        """The widths and masks that what is trained gives for the budget.

        A group's value is its standing, the criterion's and what training added, for each unit that
        the group costs, so that where all stand alike the dearest part is no better off.
        """
        section, budget = self.task.section, self.task.budget
        values = {}
        for part, place in self.task.places.items():
            standing = section.standing * place + trained[f"{part.name}.{STANDING}"].detach(
                ).double().cpu()
            values[part] = standing.clamp(min=0) * (budget.dense_cost(part) / place.numel())
        return projection.project(values, budget)

    def _step(self) -> None:
        section, state = self.task.section, self.state
        batch = self.task.training.take(rows_of_step(
            state.step, section.batch, len(self.task.training), self.task.seed)).ids
        _, masks = self.projected(self.trained)
        for ids in batch.split(section.batch // section.accumulation):
            used = {part: self._used(part, mask) for part, mask in masks.items()}
            (self.model.divergence(ids.to(self.device), used) / batch.numel()).backward()
        for group in self.optimizer.param_groups:
            group["lr"] = section.learning_rate * (
                1 + math.cos(math.pi * state.step / section.steps)) / 2
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in self.trained.items():
                if name.endswith(MULTIPLIER):
                    parameter.clamp_(min=0)
        state.tokens += batch.numel()

    def _used(self, part: Part, mask: torch.Tensor) -> torch.Tensor:
        multiplier, standing = (self.trained[f"{part.name}.{name}"]
                                for name in (MULTIPLIER, STANDING))
        return straight_through(multiplier, standing, mask.to(self.device, torch.float32))

    @torch.no_grad()
    def _judge(self) -> None:
        """The divergence as it is on what was held back; what is trained is kept where that is the
        lowest yet."""
        section, held, state = self.task.section, self.task.held_back.ids, self.state
        _, masks = self.projected(self.trained)
        used = {part: self._used(part, mask) for part, mask in masks.items()}
        total = 0.0
        for ids in held.split(section.batch // section.accumulation):
            total += float(self.model.divergence(ids.to(self.device), used))
        if not math.isfinite(total):
            raise StageError(f"learning the widths diverged at step {state.step}; lower "
                             "prune.learned.learning_rate")
        state.history.append((state.step, total / held.numel()))
        if state.best_step == state.step:
            state.best = _copied(self.trained)

    def _save(self) -> None:
        first, second = ({name: self.optimizer.state[p][part] for name, p in self.trained.items()}
                         for part in ("exp_avg", "exp_avg_sq"))
        checkpoints.save(self.task.checkpoint, self.task.identity, replace(
            self.state, values=_copied(self.trained), first=_copied(first),
            second=_copied(second)))


def _copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
