"""Stage `recover`: repair the sliced model. Methods are in `METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from bipdeploy.blocks import Block, BlockWalker
from bipdeploy.calibration import calibration_batches
from bipdeploy.checkpoint import CheckpointWriter
from bipdeploy.families import architecture, size_figures
from bipdeploy.modeling.formats import biased_config
from bipdeploy.refit import MeanShift, RidgeProblem, best_ridge
from bipdeploy.slicing import add_biases
from bipdeploy.stages.job import Job


def run(job: Job) -> None:
    """Write `model/` (the repaired checkpoint) and `recover.json`; with `none`, only the latter."""
    method = job.recipe.recover.method
    job.write("recover.json", {"method": method, **METHODS[method](job)})


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
    """
    recipe, ridge, held = job.recipe, job.recipe.recover.refit.ridge, 0
    dense = BlockWalker(job.inputs["dense"], recipe.model)
    pruned = BlockWalker(job.inputs["sliced"], recipe.model)
    job.reporter.total(len(dense), "blocks")
    windows, provenance = calibration_batches(
        recipe, job.inputs["dense"], dense.architecture.max_positions)
    if ridge == "auto":
        windows, held = hold_back(windows)
    tokens = windows[0].shape[1]
    x_dense, x_pruned = dense.embed(windows), pruned.embed(windows)
    errors = []
    source = pruned.checkpoint
    with CheckpointWriter(job.out / "model", source.config, source.folder) as writer:
        writer.add(source.tensors(source.outside_blocks()))
        for index in range(len(dense)):
            block = pruned.block(index, tokens)
            stored = source.block(index)
            x_dense, x_pruned, record = refit_block(
                dense.block(index, tokens), block, x_dense, x_pruned, ridge,
                next((t.dtype for t in stored.values()), pruned.dtype), held)
            for part, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
                module, key = getattr(block.layer, part), f"{part}.{name}.weight"
                if module is not None:
                    stored[key] = getattr(module, name).weight.to(stored[key].dtype)
            writer.add(stored, f"model.layers.{index}.")
            errors.append({"block": index, **record})
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


def refit_block(dense: Block, pruned: Block, x_dense: list[torch.Tensor],
                x_pruned: list[torch.Tensor], ridge: float | Literal["auto"],
                stored: torch.dtype, held: int = 0
                ) -> tuple[list[torch.Tensor], list[torch.Tensor], dict[str, float]]:
    """Refit one pruned block in place; x_*: its inputs, batches of [B, T, D].

    `ridge: auto` judges by the last `held` batches. Returns the outputs of the dense block, those
    of the refitted one, and the relative squared error of the block's output before and after,
    with the ridges that were chosen. Where the refit would raise that error (it can,
    when the weights' type is coarse), the block keeps the weights it had.
    """
    u_dense = [dense.attention(x).u if dense.has_attention else x for x in x_dense]
    y_dense = [u + dense.ffn(u) if dense.has_ffn else u for u in u_dense]
    unrepaired = [pruned(x) for x in x_pruned]
    energy = sum(float(y.double().square().sum()) for y in y_dense)
    before = _squared_error(unrepaired, y_dense) / energy
    original = {name: p.data.clone() for name, p in pruned.layer.named_parameters()
                if name in ("self_attn.o_proj.weight", "mlp.down_proj.weight")}

    u_pruned, chosen = x_pruned, {}
    if pruned.has_attention:
        z = [pruned.attention(x).z for x in x_pruned]
        chosen["ridge_attention"] = _solve(
            pruned.output, z, [u - x for u, x in zip(u_dense, x_pruned, strict=True)], ridge,
            stored, held)
        u_pruned = [x + pruned.output(part) for x, part in zip(x_pruned, z, strict=True)]
    y_pruned = u_pruned
    if pruned.has_ffn:
        h = [gate * up for gate, up in (pruned.ffn_parts(u) for u in u_pruned)]
        chosen["ridge_ffn"] = _solve(
            pruned.down, h, [y - u for y, u in zip(y_dense, u_pruned, strict=True)], ridge,
            stored, held)
        y_pruned = [u + pruned.down(part) for u, part in zip(u_pruned, h, strict=True)]
    after = _squared_error(y_pruned, y_dense) / energy
    if not after <= before:
        for name, weight in original.items():
            pruned.layer.get_parameter(name).data.copy_(weight)
        y_pruned, after = unrepaired, before
    return y_dense, y_pruned, {"error_before": before, "error_after": after,
                               **(chosen if ridge == "auto" else {})}


@torch.no_grad()
def bias(job: Job) -> dict[str, Any]:
    """The mean output of what was removed, as biases of both output projections: FLAP's repair.

    In one shot, as FLAP does: means are those of the dense model. It adds parameters, which the
    sizes count. A part that was removed as a whole has no projection to hold a bias.
    """
    dense = BlockWalker(job.inputs["dense"], job.recipe.model)
    pruned = BlockWalker(job.inputs["sliced"], job.recipe.model)
    job.reporter.total(len(dense), "blocks")
    windows, provenance = calibration_batches(
        job.recipe, job.inputs["dense"], dense.architecture.max_positions)
    tokens, hidden = windows[0].shape[1], dense.embed(windows)
    source = pruned.checkpoint
    config = biased_config(source.config, pruned.architecture)
    arch = architecture(config)
    errors = []
    with CheckpointWriter(job.out / "model", config, source.folder) as writer:
        writer.add(source.tensors(source.outside_blocks()))
        for index in range(len(dense)):
            hidden, added, record = bias_block(
                dense.block(index, tokens), pruned.block(index, tokens), hidden)
            writer.add(add_biases(source.block(index), arch, added), f"model.layers.{index}.")
            errors.append({"block": index, **record})
            job.reporter.advance()
    job.write_figures(size_figures(dense.architecture, arch))
    return {"calibration": provenance, "blocks": errors}


def bias_block(dense: Block, pruned: Block, hidden: list[torch.Tensor]
               ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], dict[str, float]]:
    """Add biases to a pruned block in place; hidden: the dense block's inputs, as [B, T, D].

    Returns the dense block's outputs, what was added by tensor name, and the relative squared
    error of the pruned block's outputs on these inputs before and after.
    """
    unrepaired = [pruned(x) for x in hidden]
    added, u_dense = {}, hidden
    if dense.has_attention:
        attended = [dense.attention(x) for x in hidden]
        u_dense = [a.u for a in attended]
        if pruned.has_attention:
            added["self_attn.o_proj.bias"] = _shift(
                dense.output, pruned.output, [a.z for a in attended],
                [pruned.attention(x).z for x in hidden])
    y_dense = u_dense
    if dense.has_ffn:
        whole = [gate * up for gate, up in map(dense.ffn_parts, u_dense)]
        y_dense = [u + dense.down(h) for u, h in zip(u_dense, whole, strict=True)]
        if pruned.has_ffn:
            added["mlp.down_proj.bias"] = _shift(
                dense.down, pruned.down, whole,
                [gate * up for gate, up in map(pruned.ffn_parts, u_dense)])
    repaired = [pruned(x) for x in hidden]
    energy = sum(float(y.double().square().sum()) for y in y_dense)
    return y_dense, added, {"error_before": _squared_error(unrepaired, y_dense) / energy,
                            "error_after": _squared_error(repaired, y_dense) / energy}


def _shift(whole: torch.nn.Linear, sliced: torch.nn.Linear, inputs: list[torch.Tensor],
           kept: list[torch.Tensor]) -> torch.Tensor:
    """Add the mean output of the inputs that are gone to the bias, in place; returns it."""
    shift = MeanShift(whole.weight, sliced.weight)
    for whole_input, sliced_input in zip(inputs, kept, strict=True):
        shift.see(whole_input, sliced_input)
    added = shift.bias()
    old = 0.0 if sliced.bias is None else sliced.bias
    sliced.bias = torch.nn.Parameter((old + added).to(sliced.weight.dtype))
    return added


def _solve(projection: torch.nn.Linear, inputs: list[torch.Tensor], targets: list[torch.Tensor],
           ridge: float | Literal["auto"], stored: torch.dtype, held: int) -> float:
    """Refit a projection in place, its bias left as it is, rounded to the stored type.

    Returns the ridge. What `auto` chose on the held-back batches is used on all of them.
    """
    problem = RidgeProblem(projection.weight)
    bias = projection.bias if projection.bias is not None else 0.0
    batches = [(z, target - bias) for z, target in zip(inputs, targets, strict=True)]
    for z, target in batches[:len(batches) - held]:
        problem.see(z, target)
    if ridge == "auto":
        held_back = RidgeProblem(projection.weight)
        for z, target in batches[len(batches) - held:]:
            held_back.see(z, target)
        ridge = best_ridge(problem, held_back)
        problem.absorb(held_back)
    weight = problem.solve(ridge).to(stored)
    projection.weight.data = weight.to(projection.weight.dtype)
    return ridge


def _squared_error(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return sum(float((x - y).double().square().sum()) for x, y in zip(a, b, strict=True))


METHODS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "none": nothing, "refit": refit, "bias": bias}
