"""The training loop. One process or several run it alike; the first one alone writes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bipdeploy.errors import StageError
from bipdeploy.model import loading
from bipdeploy.recipe.model import ModelSection
from bipdeploy.recipe.tune import TuneSection
from bipdeploy.running.reporter import Reporter
from bipdeploy.tuning import adapters, checkpoints, losses
from bipdeploy.tuning.checkpoints import State
from bipdeploy.tuning.data import IGNORED, Windows, derived_seed, rows_of_step


@dataclass(frozen=True)
class Task:
    """All that the result depends on, and `checkpoint`, the folder that survives a kill.

    `student` is the model that gets adapters, `dense` the teacher (read where distillation asks
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

    stepped = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=section.learning_rate)
    schedule = get_scheduler(
        "constant_with_warmup" if section.schedule == "constant" else section.schedule, stepped,
        num_warmup_steps=round(section.warmup * section.steps), num_training_steps=section.steps)
    rates = []
    for _ in range(section.steps):
        rates.append(float(stepped.param_groups[0]["lr"]))
        stepped.step()
        schedule.step()
    return rates


@torch.no_grad()
def validate(model: Any, windows: Windows, batch: int, device: torch.device) -> torch.Tensor:
    """[sum of -log p in nats, predicted tokens] over windows, in float64 on the CPU."""
    total = torch.zeros(2, dtype=torch.float64)
    model.eval()
    for start in range(0, len(windows), batch):
        ids, labels = windows.ids[start:start + batch], windows.labels[start:start + batch]
        logits = model(input_ids=ids.to(device), use_cache=False).logits
        total[0] += float(losses.cross_entropy(logits, labels.to(device)))
        total[1] += int((labels[:, 1:] != IGNORED).sum())
    return total


def train(task: Task, device: torch.device, reporter: Reporter,
          check: Callable[[], None] = lambda: None) -> State:
    """Train adapters and return the state at the end, whose `best` is what to merge.

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
    """A model with adapters, its optimiser and, for distillation, its teacher, on one device."""

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
        self.model = adapters.adapted(task.student, self.section, dtype, self.device, task.seed,
                                      trust_remote_code=code)
        self.teacher = None
        if self.section.distillation.weight > 0:
            self.teacher = loading.load_model(task.dense, dtype, self.device,
                                              trust_remote_code=code).requires_grad_(False)
        if self.section.gradient_checkpointing:
            self.model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.parameters = adapters.parameters(self.model)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=self.section.learning_rate,
                                           weight_decay=self.section.weight_decay)
        self.rates = learning_rates(self.section)
        self.state = self._start()
        # Frozen weights need no gradients' buckets; several processes average those of adapters.
        self.prepared: Any = self.accelerator.prepare_model(self.model)

    def _start(self) -> State:
        state = checkpoints.load(self.task.checkpoint)
        if state is None:
            return State(self._values(), self._values())
        adapters.load(self.model, state.adapter)
        for name, parameter in self.parameters.items() if state.first else ():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": state.first[name].to(self.device),
                "exp_avg_sq": state.second[name].to(self.device)}
        return state

    def end(self) -> None:
        """Leave nothing behind for what uses accelerate next in this process."""
        self.accelerator.free_memory()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        _forget_accelerator()

    def run(self, reporter: Reporter, check: Callable[[], None]) -> State:
        """Step until the last one, or until validation stops getting better."""
        state, section = self.state, self.section
        reporter.total(section.steps, "steps")
        reporter.advance(state.step)
        if state.step:
            reporter.note(f"goes on from step {state.step} of a run that was interrupted")
        began = time.monotonic() - state.seconds
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
        if section.dropout:
            torch.manual_seed(derived_seed(self.task.seed, "dropout", self.state.step,
                                           accelerator.process_index))
        self.prepared.train()
        for start in range(first, first + share, self._part):
            rows = slice(start, start + self._part)
            last = start + self._part >= first + share
            with nullcontext() if last else accelerator.no_sync(self.prepared):
                loss = self._loss(batch.ids[rows].to(self.device),
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

    def _loss(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        teacher = None
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                teacher = self.teacher(input_ids=ids, use_cache=False).logits
        logits = self.prepared(input_ids=ids, use_cache=False).logits
        distillation = self.section.distillation
        return losses.mixed(logits, teacher, labels, distillation.weight, distillation.temperature)

    def _evaluate(self) -> None:
        """Validation loss of the adapters as they are; keeps them where it is the lowest yet."""
        accelerator, windows = self.accelerator, self.task.validation
        mine = windows.take(torch.arange(accelerator.process_index, len(windows),
                                         accelerator.num_processes))
        total = validate(self.model, mine, self._part, self.device)
        if accelerator.num_processes > 1:
            # Sums of float64 on the device: every process comes to the same verdict.
            total = accelerator.reduce(total.to(self.device), "sum").cpu()
        loss = float(total[0] / total[1])
        if not math.isfinite(loss):
            raise StageError(f"training diverged: the validation loss is {loss} after step "
                             f"{self.state.step}; lower tune.learning_rate")
        self.state.history.append((self.state.step, loss))
        if self.state.best_step == self.state.step:
            self.state.best = self._values()

    def _values(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().cpu().clone() for name, p in self.parameters.items()}

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        self.state.adapter = self._values()
        moments = {name: self.optimizer.state.get(p, {}) for name, p in self.parameters.items()}
        self.state.first = {n: m["exp_avg"].cpu() for n, m in moments.items() if m}
        self.state.second = {n: m["exp_avg_sq"].cpu() for n, m in moments.items() if m}
        checkpoints.save(self.task.checkpoint, self.task.identity, self.state)


def _forget_accelerator() -> None:
    """accelerate keeps one set of settings for a process and refuses others; lm-eval and a second
    run in the same process may want others."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
