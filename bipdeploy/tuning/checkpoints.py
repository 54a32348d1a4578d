"""Where training stands, on disk: safetensors and JSON, written so that a kill loses neither."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bipdeploy.errors import InputError
from bipdeploy.model.checkpoint import opened
from bipdeploy.running import artifacts
from bipdeploy.running.reporter import Reporter

STATE = "state.json"


@dataclass
class State:
    """After `step` optimiser steps. history: validation loss in nats by step, in order.

    Tensors go by the names of the parameters that are trained: `values` are theirs, `first` and
    `second` AdamW's moments (absent before the first step), `best` the values of the lowest
    validation loss.
    """

    values: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor]
    first: dict[str, torch.Tensor] = field(default_factory=dict)
    second: dict[str, torch.Tensor] = field(default_factory=dict)
    step: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def best_step(self) -> int:
        """The first step of the lowest validation loss."""
        return min(self.history, key=lambda entry: entry[1])[0]

    def exhausted(self, patience: int) -> bool:
        """Whether the last `patience` evaluations all missed the lowest loss."""
        return sum(step > self.best_step for step, _ in self.history) >= patience


_PARTS = ("values", "best", "first", "second")


def save(folder: Path, identity: str, state: State) -> None:
    """Write the state. The JSON comes last and names its tensors: either all of it counts, or the
    state that was saved before does."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{state.step:08d}.safetensors"
    partial = folder / f".{name}.partial"
    save_file({f"{part}/{key}": tensor.detach().cpu().contiguous() for part in _PARTS
               for key, tensor in getattr(state, part).items()}, partial)
    partial.replace(folder / name)
    artifacts.write_json(folder / STATE, {
        "identity": identity, "tensors": name, "sha256": artifacts.sha256(folder / name),
        "step": state.step, "history": state.history, "tokens": state.tokens,
        "seconds": state.seconds})
    for other in folder.iterdir():
        if other.name not in (STATE, name):
            other.unlink()


def start(folder: Path, identity: str, reporter: Reporter) -> None:
    """Say so where what is there is of another training, and remove it."""
    if found := fault(folder, identity):
        reporter.note(f"the checkpoint of an earlier run is not used: {found}")
        discard(folder)


def begin(state: State, steps: int, reporter: Reporter) -> float:
    """Say where training goes on from; the time at which it would have begun, had it not been
    interrupted."""
    reporter.total(steps, "steps")
    reporter.advance(state.step)
    if state.step:
        reporter.note(f"goes on from step {state.step} of a run that was interrupted")
    return time.monotonic() - state.seconds


def load(folder: Path, wanted: Sequence[str] = _PARTS) -> State | None:
    """The state that was saved last, with the `wanted` of its tensors; None where there is none."""
    record = _record(folder)
    if record is None:
        return None
    parts: dict[str, Any] = {part: {} for part in _PARTS}
    with opened(folder / record["tensors"]) as file:
        for key in file.keys():
            part, _, name = key.partition("/")
            if part in wanted:
                parts[part][name] = file.get_tensor(key)
    history = [(int(step), float(loss)) for step, loss in record["history"]]
    return State(**parts, step=record["step"], history=history, tokens=record["tokens"],
                 seconds=record["seconds"])


def fault(folder: Path, identity: str) -> str | None:
    """Why a checkpoint that is there cannot be used; None where it can, or there is none."""
    if not folder.exists():
        return None
    record = _record(folder)
    if record is None:
        return "it is not whole"
    if record.get("identity") != identity:
        return "it is of another recipe, model, text or version"
    tensors = folder / str(record.get("tensors"))
    if not tensors.is_file() or artifacts.sha256(tensors) != record.get("sha256"):
        return "its tensors are damaged"
    return None


def discard(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        return artifacts.read_json(folder / STATE)
    except InputError:
        return None
