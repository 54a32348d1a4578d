"""The training loop. One process or several run it alike; the first one alone writes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bipdeploy.errors import StageError
from bipdeploy.model import loading
from bipdeploy.recipe.model import ModelSection
from bipdeploy.recipe.tune import TuneSection
from bipdeploy.running.reporter import Reporter
from bipdeploy.tuning import checkpoints, sharding, students
from bipdeploy.tuning.checkpoints import State
from bipdeploy.tuning.data import IGNORED, Windows, derived_seed, rows_of_step
from bipdeploy.tuning.students import Objective


@dataclass(frozen=True)
class Task:
    """All that the result depends on, and `checkpoint`, the folder that survives a kill.

    `student` is the model that is trained, `dense` the teacher (read where distillation asks
    for one). `identity` is a digest of all this.
    """

    section: TuneSection
    model: ModelSection
    seed: int
    student: Path
    dense: Path
    training: Windows
    validation: Windows
    checkpoint: Path
    identity: str


def compute_type(section: TuneSection, device: torch.device) -> torch.dtype:
    """The type of frozen weights and products; see `tune.dtype`."""
    if section.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, section.dtype)


def learning_rates(section: TuneSection) -> list[float]:
    """The learning rate of every step, by transformers' schedule of that name."""
    from transformers import get_scheduler

    stepped = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=section.rate)
    schedule = get_scheduler(
        "constant_with_warmup" if section.schedule == "constant" else section.schedule, stepped,
        num_warmup_steps=round(section.warmup * section.steps), num_training_steps=section.steps)
    rates = []
    for _ in range(section.steps):
        rates.append(float(stepped.param_groups[0]["lr"]))
        stepped.step()
        schedule.step()
    return rates


def train(task: Task, device: torch.device, reporter: Reporter,
          check: Callable[[], None] = lambda: None) -> State:
    """Train and return the state at the end, whose `best` is what to write.

    Goes on from the checkpoint where there is one. `check` is called before every step.
    """
    devices = list(range(torch.cuda.device_count())) if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        trainer = Trainer(task, device)
        try:
            return trainer.run(reporter, check)
        finally:
            trainer.end()


class Trainer:
    """A model, the optimiser of what is trained of it and, for distillation, its teacher."""

    def __init__(self, task: Task, device: torch.device):
        from accelerate import Accelerator

        self.task, self.section = task, task.section
        dtype = compute_type(task.section, device)
        _forget_accelerator()
        self.accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="bf16" if dtype == torch.bfloat16 else "no")
        self.device = self.accelerator.device
        code = task.model.trust_remote_code
        self.model = students.student(task.student, self.section, dtype, self.device, task.seed,
                                      trust_remote_code=code)
        teacher = None
        if self.section.taught:
            teacher = loading.load_model(task.dense, dtype, self.device,
                                         trust_remote_code=code).requires_grad_(False)
        if self.section.gradient_checkpointing:
            students.plain(self.model).gradient_checkpointing_enable({"use_reentrant": False})
        self.rates = learning_rates(self.section)
        state = checkpoints.load(task.checkpoint)
        if state:
            students.load(self.model, state.values)
        self.objective = Objective(self.model, teacher, self.section)
        self.prepared: Any = self._spread(dtype)
        self.parameters = students.parameters(self.model)
        self.optimizer = torch.optim.AdamW(
            [{"params": [p for p in self.parameters.values() if (p.ndim > 1) == matrices],
              "weight_decay": self.section.weight_decay * matrices} for matrices in (True, False)],
            lr=self.section.rate)
        self.state = state or State({}, self._values(self.parameters))
        for name, parameter in self.parameters.items() if self.state.first else ():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.state.step)),
                "exp_avg": sharding.like(parameter, self.state.first[name]),
                "exp_avg_sq": sharding.like(parameter, self.state.second[name])}
        # What the model and the optimiser hold now need not be held twice.
        self.state.values, self.state.first, self.state.second = {}, {}, {}

    def _spread(self, dtype: torch.dtype) -> Any:
        """The objective as several processes compute it together: of adapters each has all, of
        all weights a part."""
        if self.section.method == "full" and self.accelerator.num_processes > 1:
            sharding.shard(self.objective, students.blocks(self.model), dtype, self.device)
            return self.objective
        # Frozen weights need no gradients' buckets; several processes average those of the rest.
        return self.accelerator.prepare_model(self.objective)

    def end(self) -> None:
        """Leave nothing behind for what uses accelerate next in this process."""
        self.accelerator.free_memory()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        _forget_accelerator()

    def run(self, reporter: Reporter, check: Callable[[], None]) -> State:
        """Step until the last one, or until validation stops getting better."""
        state, section = self.state, self.section
        began = checkpoints.begin(state, section.steps, reporter)
        if not state.history:
            self._evaluate()
        while state.step < section.steps and not state.exhausted(section.validation.patience):
            check()
            self._step()
            state.step += 1
            if state.step % section.validation.every == 0 or state.step == section.steps:
                self._evaluate()
            state.seconds = time.monotonic() - began
            if state.step % section.checkpoint_every == 0:
                self._save()
            reporter.advance()
        self._save()
        return state

    @property
    def _part(self) -> int:
        """Windows that go through the model at once."""
        return self.section.batch // (self.section.accumulation * self.accelerator.num_processes)

    def _step(self) -> None:
        """One optimiser step. The loss is a mean over the predicted tokens of the whole step, so
        how it is split into parts and processes does not matter."""
        section, accelerator = self.section, self.accelerator
        batch = self.task.training.take(rows_of_step(
            self.state.step, section.batch, len(self.task.training), self.task.seed))
        share = section.batch // accelerator.num_processes
        first = accelerator.process_index * share
        if section.dropout and section.method == "lora":
            torch.manual_seed(derived_seed(self.task.seed, "dropout", self.state.step,
                                           accelerator.process_index))
        self.model.train()
        for start in range(first, first + share, self._part):
            rows = slice(start, start + self._part)
            last = start + self._part >= first + share
            with nullcontext() if last else accelerator.no_sync(self.prepared):
                loss = self.prepared(batch.ids[rows].to(self.device),
                                     batch.labels[rows].to(self.device))
                # Gradients are averaged over processes, and are meant to be summed.
                accelerator.backward(loss * accelerator.num_processes / batch.predicted)
        if section.clip:
            torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), section.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[self.state.step]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.tokens += batch.predicted

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Validation loss of what is trained as it is; keeps it where it is the lowest yet."""
        accelerator, windows = self.accelerator, self.task.validation
        mine = _shared_out(windows, accelerator.process_index, accelerator.num_processes)
        total = torch.zeros(2, dtype=torch.float64)  # of -log p in nats; predicted tokens
        self.model.eval()
        for start in range(0, len(mine), self._part):
            rows = slice(start, start + self._part)
            total[0] += float(self.objective(mine.ids[rows].to(self.device),
                                             mine.labels[rows].to(self.device), judging=True))
            total[1] += int((mine.labels[rows, 1:] != IGNORED).sum())
        if accelerator.num_processes > 1:
            # Sums of float64 on the device: every process comes to the same verdict.
            total = accelerator.reduce(total.to(self.device), "sum").cpu()
        loss = float(total[0] / total[1])
        if not math.isfinite(loss):
            raise StageError(f"training diverged: the validation loss is {loss} after step "
                             f"{self.state.step}; lower tune.learning_rate")
        self.state.history.append((self.state.step, loss))
        if self.state.best_step == self.state.step:
            self.state.best = self._values(self.parameters)

    def _values(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies on the CPU, whole, in the first process; all must ask for them together."""
        found = {}
        for name, tensor in tensors.items():
            value = sharding.whole(tensor.detach())
            if self.accelerator.is_main_process:
                found[name] = value.to("cpu", copy=True)
        return found

    def _save(self) -> None:
        held = {part: {name: self.optimizer.state[p][part] for name, p in self.parameters.items()
                       if p in self.optimizer.state} for part in ("exp_avg", "exp_avg_sq")}
        state = replace(self.state, values=self._values(self.parameters),
                        first=self._values(held["exp_avg"]),
                        second=self._values(held["exp_avg_sq"]))
        if self.accelerator.is_main_process:
            checkpoints.save(self.task.checkpoint, self.task.identity, state)


def _shared_out(windows: Windows, process: int, processes: int) -> Windows:
    """The windows of one process, of all as many: together they compute, so together they end.
    Where there are too few, the last is one in which nothing counts."""
    rows = torch.arange(process, len(windows), processes)
    mine = windows.take(rows)
    if len(rows) == -(-len(windows) // processes):
        return mine
    filler = windows.take(torch.tensor([0]))
    return Windows(torch.cat([mine.ids, filler.ids]),
                   torch.cat([mine.labels, torch.full_like(filler.labels, IGNORED)]))


def _forget_accelerator() -> None:
    """accelerate keeps one set of settings for a process and refuses others; lm-eval and a second
    run in the same process may want others."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
