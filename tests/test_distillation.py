"""Training of all weights: losses towards the dense model, resuming, several processes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from bipdeploy import api
from bipdeploy.recipe.tune import TuneSection
from bipdeploy.running import artifacts
from bipdeploy.running.reporter import Silent
from bipdeploy.tuning import checkpoints, losses, students, training
from bipdeploy.tuning.data import IGNORED
from tests.running import SMOKE
from tests.sliced import (
    CPU,
    architecture_of,
    draw_kept,
    loaded,
    token_windows,
    write_sliced,
)
from tests.test_tune import FULL, PLAIN, SHORT, hashes
from tests.test_tuning import distance, equal, last, saved, task


def pruned(tiny: Path, place: Path, **settings) -> training.Task:
    """Full training of a narrower copy of a model, which is its teacher."""
    small = write_sliced(tiny, place / "small", draw_kept(architecture_of(tiny), [(1, 48)] * 3))
    job = task(small, place / "c", method="full", **{"learning_rate": 1e-3, **settings})
    return training.Task(**{**vars(job), "dense": tiny})


def test_losses_in_slices_are_those_of_the_whole_and_so_are_their_gradients():
    torch.manual_seed(0)
    head, dense = torch.nn.Linear(6, 11), torch.nn.Linear(6, 11)
    states, taught = torch.randn(10, 6, requires_grad=True), torch.randn(10, 6)
    targets = torch.randint(11, (10,))

    def of(size: int) -> tuple[torch.Tensor, ...]:
        loss = losses.in_slices(states, head, targets, size, teacher=(taught, dense), weight=0.7,
                                temperature=1.5)
        return loss.detach(), *torch.autograd.grad(loss, [states, head.weight])

    with torch.no_grad():
        direct = losses.mixed(head(states), dense(taught), targets, 0.7, 1.5)
    whole = of(10)
    assert torch.allclose(whole[0], direct)
    for size in (1, 3, 9):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(of(size), whole, strict=True))
    assert dense.weight.grad is None


def test_no_more_logits_than_a_slice_are_made_at_once():
    sizes = []

    def head(states: torch.Tensor) -> torch.Tensor:
        sizes.append(len(states))
        return states

    states = torch.randn(10, 6, requires_grad=True)
    losses.in_slices(states, head, torch.zeros(10, dtype=torch.long), 4).backward()
    assert max(sizes) == 4 and sum(sizes) == 20  # forwards, and again backwards


def test_a_model_s_divergence_from_itself_is_0_and_so_is_its_gradient():
    torch.manual_seed(0)
    logits_PV = torch.randn(5, 7, requires_grad=True)
    loss = losses.divergence(logits_PV, logits_PV.detach(), 1.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert logits_PV.grad is not None and logits_PV.grad.abs().max() < 1e-6


def test_outputs_are_measured_token_by_token():
    labels = torch.tensor([[1, 1, 1, IGNORED]])
    dense = torch.randn(1, 4, 8)
    dense[0, 0] *= 1e4  # a massive activation
    own = dense * torch.tensor([1.1, 1.2, 9, 9])[None, :, None]
    assert float(losses.hidden_error([own, dense], [dense, dense], labels)) == pytest.approx(
        (0.1 ** 2 + 0.2 ** 2) / 2, rel=1e-3)
    assert float(losses.hidden_error([dense], [dense], labels)) == 0


def test_the_dense_model_teaches_itself_nothing(tiny, tmp_path):
    section = TuneSection(method="full", distillation={"hidden": 1.0})
    model = students.student(tiny, section, torch.float32, CPU, 0)
    ids = token_windows(2, 16)
    loss = students.Objective(model, loaded(tiny), section)(ids, ids)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-4)
    assert max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-4


@pytest.mark.parametrize("distillation", [{}, {"hidden": 1.0}, {"weight": 0.5}])
def test_all_weights_move_towards_the_dense_model(tiny, tmp_path, distillation):
    job = pruned(tiny, tmp_path, distillation=distillation, steps=8)
    model = students.student(job.student, job.section, torch.float32, CPU, 0)
    before = {name: p.detach().clone() for name, p in students.parameters(model).items()}
    ids = job.validation.ids

    first = distance(model, tiny, ids)
    students.load(model, last(job))
    assert distance(model, tiny, ids) < first
    assert all(not torch.equal(before[name], p) for name, p in students.parameters(model).items())


@pytest.mark.parametrize("settings", [{"accumulation": 4}, {"gradient_checkpointing": True}])
def test_how_a_step_of_all_weights_is_computed_changes_rounding_only(tiny, tmp_path, settings):
    for place in "ab":
        (tmp_path / place).mkdir()
    options = {"distillation": {"hidden": 0.5}}
    whole = last(pruned(tiny, tmp_path / "a", **options))
    split = last(pruned(tiny, tmp_path / "b", **options, **settings))
    assert max(float((whole[n] - split[n]).abs().max()) for n in whole) < 1e-4


def test_training_of_all_weights_goes_on_to_the_same_bits(tiny, tmp_path):
    class Killed(Exception):
        pass

    def kill() -> None:
        if checkpoints.load(job.checkpoint):
            raise Killed

    for place in "ab":
        (tmp_path / place).mkdir()
    settings = {"distillation": {"hidden": 0.5}, "weight_decay": 0.1}
    whole = pruned(tiny, tmp_path / "a", **settings)
    first = training.train(whole, CPU, Silent())
    job = pruned(tiny, tmp_path / "b", checkpoint_every=3, **settings)
    with pytest.raises(Killed):
        training.train(job, CPU, Silent(), kill)
    reporter = Silent()
    second = training.train(job, CPU, reporter)
    assert reporter.notes == ["goes on from step 3 of a run that was interrupted"]
    assert equal(saved(whole.checkpoint).values, saved(job.checkpoint).values)
    assert equal(first.best, second.best) and first.history == second.history


# Whole runs

@pytest.mark.slow
def test_a_run_trains_all_weights_towards_the_dense_model(smoke, tmp_path):
    def again(*overrides: str, until: str):
        return api.run(SMOKE, [*SHORT, *overrides], tmp_path, until=until)

    shutil.copytree(smoke.folder, tmp_path / "smoke")
    settings = ["recover.method=none", *FULL, "tune.distillation.hidden=0.1", "tune.steps=8",
                "evaluate.perplexity.max_tokens=4000"]
    untrained = again("recover.method=none", "tune.enabled=false", settings[-1],
                      until="evaluate").figures["perplexity.pruned"]
    result = again(*settings, until="report")
    folder, figures = result.folder, result.figures
    assert figures["tune.loss.after"] < figures["tune.loss.before"] - 0.05
    assert figures["perplexity.pruned"] < 0.95 * untrained
    record = artifacts.read_json(folder / "tune" / "tune.json")
    assert (record["method"], record["steps"]) == ("full", 8)
    assert record["trained_parameters"] == figures["parameters.pruned"]
    assert hashes(folder / "tune/model") == hashes(folder / "export/transformers")
    assert "All weights trained: 8 steps" in (folder / "report" / "report.md").read_text()
    card = (folder / "export/transformers/README.md").read_text()
    assert "All weights were then trained on `builtin:pydocs` with the dense model" in card
    assert not artifacts.checkpoint_folder(folder / "tune").exists()


@pytest.mark.slow
def test_two_processes_that_were_killed_go_on_to_the_same_weights(smoke, tmp_path):
    sliced = smoke.folder / "prune" / "model"
    settings = [*PLAIN, *FULL, "tune.steps=8", "tune.processes=2", "tune.checkpoint_every=3"]
    whole = api.tune("builtin:pico", sliced, tmp_path / "whole", settings)

    class Stopped(Silent):
        steps = 0

        def advance(self, steps: int = 1) -> None:
            self.steps += steps
            if self.steps == 5:
                raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        api.tune("builtin:pico", sliced, out, settings, Stopped())
    reporter = Silent()
    api.tune("builtin:pico", sliced, out, settings, reporter)
    assert re.fullmatch(r"goes on from step [36] of a run that was interrupted", reporter.notes[0])
    assert hashes(out / "model") == hashes(whole / "model")
