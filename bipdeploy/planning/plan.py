"""What a recipe will make, before it runs: widths, sizes, costs, and what the widths divide by.

All from `config.json`, or from the recipe's `model.shape` where that cannot be had: no torch is
imported and no weights are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from bipdeploy.model import cost
from bipdeploy.model.families import Architecture, BlockWidths, size_figures
from bipdeploy.planning import cpu_peak, footprint, gpus
from bipdeploy.planning.resolved import Resolved
from bipdeploy.pruning.divisibility import counted, faults, group_faults, tensor_core_faults
from bipdeploy.recipe.recipe import Recipe

_PARALLEL = (2, 4, 8)
_GROUPS = (64, 128)
Known = Literal["exact", "run", "budget", "unmeasured"]


@dataclass(frozen=True)
class Verdict:
    """Whether the pruned widths meet a requirement; None: not known before scoring."""

    requirement: str
    divides: bool | None
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A dense model and what a recipe makes of it.

    `known`: `exact` (the widths follow from the sizes), `run` (they are those of a finished run),
    `budget` (they depend on scores, and are uniform ones of the same budget until then; of the
    `dropped` parts the first that may leave stand in for those that will) or `unmeasured` (they
    depend on times that this machine has not measured, and are what bytes and FLOPs alone ask for).
    `source`: `config`, or `shape` where the recipe's own sizes had to do.
    `costs`: by name, of `dense` and `pruned`: bytes, and FLOPs per token. `speedups`: how many
    times as fast at the `memory_bound` and the `compute_bound` end. `roofline`: seconds on the GPU,
    by phase, lower bounds. `stages`: estimates over the figures of `machine`. `disk`: bytes that
    a run `needed` and that are `free`; None of a finished one. `calibration`: the `windows` that
    are drawn, and the `tokens` of each; `text`: the same in words. `note`: what the recipe should
    be changed for.
    """

    name: str
    model: str
    ratio: float
    layers: str
    tensor_parallel: int
    known: Known
    dense: tuple[BlockWidths, ...]
    pruned: tuple[BlockWidths, ...]
    figures: dict[str, float]
    verdicts: tuple[Verdict, ...]
    dropped: dict[str, int]
    target: dict[str, Any] | None
    source: Literal["config", "shape"]
    batch: int
    context: int
    costs: dict[str, dict[str, float]]
    speedups: dict[str, float]
    gpu: gpus.Gpu | None
    roofline: dict[str, dict[str, float]] | None
    machine: dict[str, Any]
    stages: dict[str, footprint.Stage]
    disk: dict[str, float]
    calibration: dict[str, int]
    text: str
    note: str | None


def make(resolved: Resolved, made: Sequence[BlockWidths] | None, folder: Path) -> Plan:
    """Plan what a recipe was resolved to. `made`: the widths of its finished run, where it has run;
    `folder`: where that is or will be. Raises InputError where the budget cannot be met."""
    recipe, arch, target = resolved.recipe, resolved.architecture, resolved.target
    known: Known = "exact"
    pruned = possible = resolved.uniform
    if resolved.scored:
        known = "run" if made else "budget"
        pruned = possible = tuple(made or resolved.uniform)
        if recipe.prune.layers != "uniform" and not made:
            possible = resolved.possible
    if known != "run" and target and target.section.timed and not target.table:
        known = "unmeasured"
    after = resolved.exported(pruned)
    gpu = gpus.GPUS[recipe.hardware.gpu] if recipe.hardware.gpu else None
    sized = footprint.sizes(resolved, after)
    bench = recipe.bench.torch
    context = bench.prompt_tokens + bench.new_tokens
    costs = {name: {"dense": spent(arch), "pruned": spent(after)} for name, spent in _costs(
        sized.stored, bench.batch, bench.prompt_tokens, context).items()}
    rates = ({name: getattr(gpu, name) for name in ("flops", "bandwidth", "single", "double")}
             if gpu else cpu_peak.measured())
    machine: dict[str, Any] = {"name": f"{gpu.name}, roofline" if gpu else
                               "this CPU, measured for a second", **rates}
    stages = footprint.stages(sized, rates)
    needed, free = footprint.space({n: s.writes for n, s in stages.items()}, list(stages), folder)
    return Plan(
        recipe.name, recipe.model.id, _ratio(resolved, pruned), recipe.prune.layers,
        resolved.parallel, known, arch.blocks, pruned, size_figures(arch, after),
        tuple(_verdicts(arch, possible, resolved.parallel, certain=known in ("exact", "run"))),
        recipe.prune.depth.model_dump(),
        target=target.record(pruned) if target else None,
        source="shape" if resolved.folder is None and recipe.model.shape else "config",
        batch=bench.batch, context=context, costs=costs,
        speedups={"memory_bound": _gain(costs["decode_bytes_read"]),
                  "compute_bound": _gain(costs["prefill_flops_per_token"])},
        gpu=gpu, roofline=_roofline(gpu, arch, after, sized.computed, recipe) if gpu else None,
        machine=machine, stages=stages, disk={"needed": needed, "free": free},
        calibration={"windows": recipe.calibration.windows, "tokens": recipe.calibration.tokens},
        text=resolved.text, note=resolved.text_note)


def _ratio(resolved: Resolved, pruned: Sequence[BlockWidths]) -> float:
    """The share of block parameters that is asked for or, with another target, removed."""
    dense = resolved.architecture
    whole = cost.parameters(dense)
    return resolved.recipe.prune.share or 1 - whole.whole(pruned) / whole.whole(dense.blocks)


def _costs(stored: int, batch: int, prompt: int, context: int
           ) -> dict[str, Callable[[Architecture], float]]:
    """What is shown of a model. FLOPs per token: of a prefill of the prompt with the logits of its
    last token, and of a decode step that sees `context` tokens."""
    return {
        "disk_bytes": lambda a: stored * a.parameters(),
        "kv_bytes_per_token": lambda a: a.kv_bytes_per_token(bytes_per_value=stored),
        "kv_cache_bytes": lambda a: batch * context * a.kv_bytes_per_token(bytes_per_value=stored),
        "prefill_flops_per_token": lambda a: (cost.flops(a, prompt).whole(a.blocks)
                                              + cost.head_flops(a, 1)) / prompt,
        "decode_flops_per_token": lambda a: (cost.flops(a, 1, context - 1).whole(a.blocks)
                                             + cost.head_flops(a, 1)),
        "decode_bytes_read": lambda a: cost.read_per_step(a, stored, batch, context)}


def _gain(values: Mapping[str, float]) -> float:
    return values["dense"] / values["pruned"]


def _roofline(gpu: gpus.Gpu, dense: Architecture, pruned: Architecture, value: int,
              recipe: Recipe) -> dict[str, dict[str, float]]:
    """Seconds by phase, dense and pruned, and whether the weights fit: `memory`, a share of it."""
    bench = recipe.bench.torch
    bounds = {which: footprint.roofline(arch, value, bench.batch, bench.prompt_tokens, gpu.flops,
                                        gpu.bandwidth)
              for which, arch in (("dense", dense), ("pruned", pruned))}
    shares = {which: (value * arch.parameters() + bench.batch * arch.kv_bytes_per_token(
        bytes_per_value=value) * (bench.prompt_tokens + bench.new_tokens)) / gpu.memory
        for which, arch in (("dense", dense), ("pruned", pruned))}
    return {**{phase: {which: bounds[which][phase] for which in bounds}
               for phase in bounds["dense"]}, "memory": shares}


def _verdicts(arch: Architecture, widths: Sequence[BlockWidths], parallel: int, *,
              certain: bool) -> list[Verdict]:
    """Tensor parallelism over the usual numbers of GPUs, and quantisation at the recipe's own."""
    checks: dict[str, Callable[[Sequence[BlockWidths]], list[str]]] = {
        f"tensor parallel {n}": partial(faults, parallel=n)
        for n in sorted({*_PARALLEL, parallel} - {1})}
    split = f", tensor parallel {parallel}" if parallel > 1 else ""
    for size in _GROUPS:
        checks[f"quantisation groups of {size}{split}"] = partial(
            group_faults, arch, group=size, parallel=parallel)
        checks[f"tensor-core multiples of {size}{split}"] = partial(
            tensor_core_faults, arch, multiple=size, parallel=parallel)
    return [_verdict(name, check, widths, certain) for name, check in checks.items()]


def _verdict(requirement: str, check: Callable[[Sequence[BlockWidths]], list[str]],
             widths: Sequence[BlockWidths], certain: bool) -> Verdict:
    found = check(widths)
    if found and not certain:
        found = check([])  # what no width can mend
        return Verdict(requirement, False if found else None, tuple(found))
    return Verdict(requirement, not found, tuple(found))


def described(blocks: Sequence[BlockWidths]) -> list[str]:
    """A line for each run of equal blocks: `blocks 0-3: 32 heads, 32 KV heads, 11008 channels`."""
    lines = []
    for widths, equal in groupby(range(len(blocks)), lambda i: blocks[i]):
        run = list(equal)
        which = f"block {run[0]}" if len(run) == 1 else f"blocks {run[0]}-{run[-1]}"
        lines.append(f"{which}: {counted(widths.heads, 'head')}, "
                     f"{counted(widths.kv_heads, 'KV head')}, "
                     f"{counted(widths.intermediate, 'channel')}")
    return lines
