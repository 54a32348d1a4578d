"""What a recipe will make, before it runs: widths, sizes, and what the widths divide by.

All from `config.json`: no torch is imported and no weights are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from bipdeploy import artifacts, pipeline, sources
from bipdeploy.allocation import possible_widths, uniform_widths
from bipdeploy.checkpoint import read_config
from bipdeploy.divisibility import counted, faults, group_faults
from bipdeploy.families import Architecture, BlockWidths, architecture, size_figures
from bipdeploy.modeling.formats import biased_config, pruned_config
from bipdeploy.recipe import Recipe

_PARALLEL = (2, 4, 8)
_GROUPS = (64, 128)
Known = Literal["exact", "run", "budget"]


@dataclass(frozen=True)
class Verdict:
    """Whether the pruned widths meet a requirement; None: not known before scoring."""

    requirement: str
    divides: bool | None
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A dense model and what a recipe makes of it.

    `known`: `exact` (the widths follow from the sizes), `run` (they are those of a finished run)
    or `budget` (they depend on scores, and are uniform ones of the same budget until then; of the
    `dropped` parts the first that may leave stand in for those that will).
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


def make(recipe: Recipe, runs: Path) -> Plan:
    """Plan a recipe; `runs` is where its finished run may be. Raises InputError as `run` would."""
    dense = sources.model_folder(recipe.model.id, recipe.model.revision, weights=False)
    pipeline.preflight(recipe, dense)
    config = read_config(dense)
    arch = architecture(config)
    parallel = recipe.hardware.tensor_parallel
    uniform = tuple(uniform_widths(arch, recipe.prune, tensor_parallel=parallel))
    known: Known = "exact"
    pruned = possible = uniform
    if recipe.prune.layers != "uniform" or recipe.prune.depth.any:
        made = _made(recipe, dense, runs / recipe.name / "prune")
        known = "run" if made else "budget"
        pruned = made or uniform
        if recipe.prune.layers != "uniform":
            possible = tuple(possible_widths(arch, recipe.prune, tensor_parallel=parallel))
        possible = made or possible
    return Plan(recipe.name, recipe.model.id, recipe.prune.ratio, recipe.prune.layers, parallel,
                known, arch.blocks, pruned,
                size_figures(arch, _architecture(recipe, config, arch, pruned)),
                tuple(_verdicts(arch, possible, parallel, certain=known != "budget")),
                recipe.prune.depth.model_dump())


def _architecture(recipe: Recipe, config: Mapping[str, Any], dense: Architecture,
                  widths: Sequence[BlockWidths]) -> Architecture:
    """The sizes of what is exported: at these widths, and with the biases of its repair."""
    made = pruned_config(config, dense, widths)
    if recipe.recover.method == "bias":
        made = biased_config(made, architecture(made))
    return architecture(made)


def _made(recipe: Recipe, dense: Path, folder: Path) -> tuple[BlockWidths, ...] | None:
    """The widths that the prune stage made of exactly this recipe, where it has run.

    That it is the same model is told from hashes of its files, as when a stage is reused.
    """
    if artifacts.read_manifest(folder) is None:
        return None
    if not pipeline.intact(folder, pipeline.stage_keys(recipe, dense)["prune"]):
        return None
    return tuple(BlockWidths(b["heads"], b["kv_heads"], b["intermediate"])
                 for b in artifacts.read_json(folder / "kept.json")["blocks"])


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
