"""Stage `recover`: repair the sliced model. The table of repairs is `repairs.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import torch

from bipdeploy.data.calibration import calibration_batches
from bipdeploy.model import finite
from bipdeploy.model.activations import Batches, Keep, keeping
from bipdeploy.model.blocks import Block, BlockWalker, ahead
from bipdeploy.model.checkpoint import CheckpointWriter
from bipdeploy.model.families import architecture, size_figures
from bipdeploy.model.formats import biased_config
from bipdeploy.planning.job import Job
from bipdeploy.pruning.refit import MeanShift, RidgeProblem, best_ridge
from bipdeploy.pruning.reselection import choose
from bipdeploy.pruning.slicing import add_biases, slice_block
from bipdeploy.stages.repairs import REPAIRS


def run(job: Job) -> None:
    """Write `model/` (the repaired checkpoint) and `recover.json`; with `none`, only the latter."""
    method = job.recipe.recover.method
    job.write("recover.json", {"method": method, **REPAIRS[method].load()(job)})


def nothing(job: Job) -> dict[str, Any]:
    """Leave the sliced model as it is: later stages read it from the prune stage."""
    job.reporter.total(1)
    return {}


@torch.no_grad()
def refit(job: Job) -> dict[str, Any]:
    """Sequential least squares to the dense model's block outputs.

    Both models are walked together. The pruned block gets the pruned model's own input, so each
    refit also repairs the error that earlier blocks let through. Weights are rounded to the
    checkpoint's type before they are used: later blocks are fitted to what will be served.
    With `reselect` each block is sliced anew from the dense one first, at the same widths.
    """
    recipe, ridge, held = job.recipe, job.recipe.recover.refit.ridge, 0
    dense = BlockWalker(job.dense.checkpoint, recipe.model)
    pruned = BlockWalker(job.inputs["sliced"], recipe.model)
    job.reporter.total(len(dense), "blocks")
    windows, provenance = calibration_batches(
        recipe, job.inputs["dense"], dense.architecture.max_positions)
    if ridge == "auto":
        windows, held = hold_back(windows)
    tokens = windows[0].shape[1]
    errors = []
    source = pruned.checkpoint
    with (keeping(job.out, recipe.calibration.spill, 4 * dense.bytes_of(windows)) as keep,
          CheckpointWriter(job.out / "model", source.config, source.folder) as writer):
        x_dense, x_pruned = dense.embed(windows, keep), pruned.embed(windows, keep)
        writer.add_outside_blocks(source)
        for index, (whole, stored) in enumerate(ahead(
                len(dense), lambda number: (dense.checkpoint.block(number), source.block(number)))):
            kept = None
            if recipe.recover.refit.reselect:
                kept = choose(dense.placed(whole, index, tokens), dense.architecture.blocks[index],
                              pruned.architecture.blocks[index], x_dense, x_pruned,
                              dense.config.rms_norm_eps)
                stored = slice_block(whole, dense.architecture, index, kept)
            block = pruned.placed(stored, index, tokens)
            x_dense, x_pruned, record = refit_block(
                partial(dense.placed, whole, index, tokens), block, x_dense, x_pruned, ridge,
                next((tensor.dtype for tensor in stored.values()), pruned.dtype), held, keep)
            for part, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
                module, key = getattr(block.layer, part), f"{part}.{name}.weight"
                if module is not None:
                    stored[key] = getattr(module, name).weight.to(stored[key].dtype)
            writer.add(stored, f"model.layers.{index}.")
            del block, stored, whole
            finite.require(f"outputs of block {index}, or its refit,", record.values(),
                           pruned.dtype)
            again = asdict(kept) if kept else {}
            if kept and not kept.queries:
                del again["queries"]
            errors.append({"block": index, **record, **again})
            job.reporter.advance()
    return {"ridge": ridge, "calibration": provenance, "blocks": errors}


def hold_back(windows: list[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
    """Batches of windows whose last eighth, which is the end of the text, has its own batches.

    Returns the batches and how many of them are held back.
    """
    together = torch.cat(windows)
    assert len(together) > 1  # the recipe is refused otherwise
    count = -(-len(together) // 8)
    held = together[-count:].split(len(windows[0]))
    return [*together[:-count].split(len(windows[0])), *held], len(held)


def refit_block(dense: Callable[[], Block], pruned: Block, x_dense: Batches, x_pruned: Batches,
                ridge: float | Literal["auto"], stored: torch.dtype, held: int = 0,
                keep: Keep = list) -> tuple[Batches, Batches, dict[str, float]]:
    """Refit one pruned block in place; x_*: its inputs, batches of [B, T, D].

    `dense` loads the dense block, which is let go before anything is solved. `ridge: auto` judges
    by the last `held` batches. Returns the outputs of the dense block, those of the refitted one,
    and the relative squared error of the block's output before and after, with the ridges that
    were chosen. Where the refit would raise that error (it can, when the weights' type is coarse),
    the block keeps the weights it had.

    Three passes, so that no batch's inputs of a projection outlive it: one through both blocks as
    they are, one for each weight that is new.
    """
    errors = Errors()
    original = {name: p.data.clone() for name, p in pruned.layer.named_parameters()
                if name in ("self_attn.o_proj.weight", "mlp.down_proj.weight")}
    fitted = len(x_pruned) - held
    attention = Repair(pruned.output, fitted) if pruned.has_attention else None

    def as_they_are() -> Iterator[torch.Tensor]:
        whole = dense()
        for number, (x, x_own) in enumerate(zip(x_dense, x_pruned, strict=True)):
            u = whole.attention(x).u if whole.has_attention else x
            y = u + whole.ffn(u) if whole.has_ffn else u
            u_own = x_own
            if attention is not None:
                own = pruned.attention(x_own)
                u_own = own.u
                attention.see(number, own.z, u - x_own)
            y_own = u_own + pruned.ffn(u_own) if pruned.has_ffn else u_own
            errors.see(y, y_own)
            yield y

    def repaired() -> Iterator[torch.Tensor]:
        for x_own, y in zip(x_pruned, y_dense, strict=True):
            y_own = pruned(x_own)
            errors.see_repaired(y, y_own)
            yield y_own

    chosen = {}
    y_dense = keep(as_they_are())
    if attention is not None:
        chosen["ridge_attention"] = attention.solve(ridge, stored)
    attention = None  # its sums make room for the next
    if pruned.has_ffn:
        ffn = Repair(pruned.down, fitted)
        for number, (x_own, y) in enumerate(zip(x_pruned, y_dense, strict=True)):
            u_own = pruned.attention(x_own).u if pruned.has_attention else x_own
            gate, up = pruned.ffn_parts(u_own)
            ffn.see(number, gate * up, y - u_own)
        chosen["ridge_ffn"] = ffn.solve(ridge, stored)
        del ffn
    y_pruned = keep(repaired())
    if errors.rose:  # what is not finite is left, to be seen
        for name, weight in original.items():
            pruned.layer.get_parameter(name).data.copy_(weight)
        del y_pruned  # what is kept has room for one set less
        y_pruned = keep(pruned(x) for x in x_pruned)
        errors.after = errors.before
    return y_dense, y_pruned, errors.record() | (chosen if ridge == "auto" else {})


class Errors:
    """How far a block's output is from the dense one's: sums of squares by coordinate [D]."""

    def __init__(self) -> None:
        self.energy = self.before = self.after = torch.zeros(1, dtype=torch.float64)

    def see(self, y: torch.Tensor, own: torch.Tensor) -> None:
        """Take in a batch [B, T, D] of the dense block's outputs, and of the sliced one's."""
        self.energy, self.before = self.energy + _squares(y), self.before + _squares(own - y)

    def see_repaired(self, y: torch.Tensor, own: torch.Tensor) -> None:
        """The same of the repaired one's."""
        self.after = self.after + _squares(own - y)

    @property
    def rose(self) -> bool:
        return bool(self.after.sum() > self.before.sum())

    def record(self) -> dict[str, float]:
        """Relative squared errors: of the whole output, and the median over its coordinates. A few
        massive activations (arXiv 2402.17762) can hold nearly all of a real model's energy, and
        hide in the first what the second shows."""
        found = {}
        for name, error in (("before", self.before), ("after", self.after)):
            found[f"error_{name}"] = float(error.sum() / self.energy.sum())
            share = error / self.energy.clamp_min(torch.finfo(torch.float64).tiny)
            found[f"median_error_{name}"] = float(share.median())
        return found


class Repair:
    """A projection that is being refitted: to the first `fitted` batches, then to all."""

    def __init__(self, projection: torch.nn.Linear, fitted: int):
        self.projection, self._fitted = projection, fitted
        self._problem = RidgeProblem(projection.weight)
        self._held_back: RidgeProblem | None = None

    def see(self, number: int, inputs: torch.Tensor, target: torch.Tensor) -> None:
        """Take in batch `number`: the projection's inputs, and what its output should be."""
        if self.projection.bias is not None:
            target = target - self.projection.bias
        if number < self._fitted:
            self._problem.see(inputs, target)
        else:
            self._held_back = self._held_back or RidgeProblem(self.projection.weight)
            self._held_back.see(inputs, target)

    def solve(self, ridge: float | Literal["auto"], stored: torch.dtype) -> float:
        """Refit the projection in place, its bias left as it is, rounded to the stored type.

        Returns the ridge. What `auto` chose on the held-back batches is used on all of them.
        """
        if ridge == "auto":
            assert self._held_back is not None
            ridge = best_ridge(self._problem, self._held_back)
            self._problem.absorb(self._held_back)
        weight = self._problem.solve(ridge).to(stored)
        self.projection.weight.data = weight.to(self.projection.weight.dtype)
        return ridge


@torch.no_grad()
def bias(job: Job) -> dict[str, Any]:
    """The mean output of what was removed, as biases of both output projections: FLAP's repair.

    In one shot, as FLAP does: means are those of the dense model. It adds parameters, which the
    sizes count. A part that was removed as a whole has no projection to hold a bias.
    """
    dense = BlockWalker(job.dense.checkpoint, job.recipe.model)
    pruned = BlockWalker(job.inputs["sliced"], job.recipe.model)
    job.reporter.total(len(dense), "blocks")
    windows, provenance = calibration_batches(
        job.recipe, job.inputs["dense"], dense.architecture.max_positions)
    tokens, source = windows[0].shape[1], pruned.checkpoint
    config = biased_config(source.config, pruned.architecture)
    arch = architecture(config)
    errors = []
    with (keeping(job.out, job.recipe.calibration.spill, 2 * dense.bytes_of(windows)) as keep,
          CheckpointWriter(job.out / "model", config, source.folder) as writer):
        hidden = dense.embed(windows, keep)
        writer.add_outside_blocks(source)
        for index in range(len(dense)):
            hidden, added, record = bias_block(
                dense.block(index, tokens), pruned.block(index, tokens), hidden, keep)
            writer.add(add_biases(source.block(index), arch, added), f"model.layers.{index}.")
            finite.require(f"outputs of block {index}, or its biases,", record.values(),
                           pruned.dtype)
            errors.append({"block": index, **record})
            job.reporter.advance()
    job.write_figures(size_figures(dense.architecture, arch))
    return {"calibration": provenance, "blocks": errors}


def bias_block(dense: Block, pruned: Block, hidden: Batches, keep: Keep = list
               ) -> tuple[Batches, dict[str, torch.Tensor], dict[str, float]]:
    """Add biases to a pruned block in place; hidden: the dense block's inputs, as [B, T, D].

    Returns the dense block's outputs, what was added by tensor name, and the relative squared
    error of the pruned block's outputs on these inputs before and after.
    """
    errors = Errors()
    shifts: dict[torch.nn.Linear, MeanShift] = {}
    if dense.has_attention and pruned.has_attention:
        shifts[pruned.output] = MeanShift(dense.output.weight, pruned.output.weight)
    if dense.has_ffn and pruned.has_ffn:
        shifts[pruned.down] = MeanShift(dense.down.weight, pruned.down.weight)

    def as_they_are() -> Iterator[torch.Tensor]:
        for x in hidden:
            y = u = x
            if dense.has_attention:
                attended = dense.attention(x)
                y = u = attended.u
                if pruned.has_attention:
                    shifts[pruned.output].see(attended.z, pruned.attention(x).z)
            if dense.has_ffn:
                h = _product(dense.ffn_parts(u))
                y = u + dense.down(h)
                if pruned.has_ffn:
                    shifts[pruned.down].see(h, _product(pruned.ffn_parts(u)))
            errors.see(y, pruned(x))
            yield y

    y_dense, added = keep(as_they_are()), {}
    names = {module: name for name, module in pruned.layer.named_modules()}
    for projection, shift in shifts.items():
        own = added[f"{names[projection]}.bias"] = shift.bias()
        old = 0.0 if projection.bias is None else projection.bias
        projection.bias = torch.nn.Parameter((old + own).to(projection.weight.dtype))
    for x, y in zip(hidden, y_dense, strict=True):
        errors.see_repaired(y, pruned(x))
    return y_dense, added, errors.record()


def _product(parts: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return parts[0] * parts[1]


def _squares(x: torch.Tensor) -> torch.Tensor:
    """Sums over all tokens of the squares of each coordinate: [D], on the CPU."""
    return x.flatten(0, -2).double().square().sum(0).cpu()
