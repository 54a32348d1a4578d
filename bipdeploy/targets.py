"""`prune.target`: from a budget in FLOPs, bytes or seconds to the ratio whose widths meet it.

No torch: what is exact is known from config.json, and times come from the cached table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bipdeploy import cost, latency
from bipdeploy.allocation import narrowest, uniform_widths
from bipdeploy.cost import Cost
from bipdeploy.depth import Influence, dropped
from bipdeploy.errors import InputError
from bipdeploy.families import Architecture, BlockWidths, architecture
from bipdeploy.recipe import PruneSection, Recipe
from bipdeploy.recipe_target import TargetSection

_STEPS = 30  # of the bisection; the ratio is then known to 1e-9

Widths = Sequence[BlockWidths]


@dataclass(frozen=True)
class Target:
    """A budget: the widths' `cost` may be at most `limit`; that of the dense model is `dense`."""

    section: TargetSection
    cost: Cost
    limit: float
    dense: float
    unit: str
    table: latency.Table | None = None

    def reached(self, widths: Widths) -> float:
        """What widths come to, in what the recipe asks for: a share, bytes, or times as fast."""
        spent = self.cost.whole(widths)
        if self.section.kind == "memory":
            return spent
        return self.dense / spent if self.section.timed else 1 - spent / self.dense

    def record(self, widths: Widths) -> dict[str, Any]:
        """What was asked for and reached, for kept.json."""
        return {"kind": self.section.kind, "asked": self.section.asked,
                "reached": self.reached(widths), "unit": self.unit, "limit": self.limit,
                "spent": self.cost.whole(widths), "dense": self.dense,
                "batch": self.section.batch, "context": self.section.tokens or None,
                "profile": self.table and self.table.digest}

    def figures(self, widths: Widths) -> dict[str, float]:
        return {"prune.target.asked": self.section.asked,
                "prune.target.reached": self.reached(widths)}


def table_key(recipe: Recipe, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The key of the measured times that a recipe's target needs; None where it needs none."""
    target = recipe.prune.target
    if not (target and target.timed):
        return None
    return latency.key(config, recipe.model, target.batch, target.tokens)


def find(recipe: Recipe, config: Mapping[str, Any], table: latency.Table | None) -> Target | None:
    """The budget that a recipe asks for; None where it is a share of the parameters.

    Without a `table` a speed-up is judged by what bounds it at best: the bytes that a decode step
    reads, the FLOPs of a prefill. That is for plans alone. Raises InputError where a budget is no
    less than what the dense model costs.
    """
    asked = recipe.prune.target
    if asked is None or asked.kind == "parameters":
        return None
    arch = architecture(config)
    if asked.kind == "flops":
        return _target(asked, arch, cost.flops(arch, asked.tokens), "FLOPs")
    if asked.kind == "memory":
        return _target(asked, arch, cost.memory(_repaired(recipe, config, arch),
                                                _stored(config), asked.batch * asked.tokens),
                       "bytes")
    phase = asked.kind.removesuffix("_speedup")
    if table:
        return _target(asked, arch, table.phases[phase].cost, "seconds", table)
    if phase == "decode":
        spent = cost.memory(arch, 2, asked.batch * asked.tokens)
        outside = 0 if arch.tied else 2 * arch.vocabulary * arch.hidden  # rows that are not read
        return _target(asked, arch, replace(spent, rest=spent.rest - outside), "bytes read")
    return _target(asked, arch, replace(cost.flops(arch, asked.tokens),
                                        rest=cost.head_flops(arch, 1)), "FLOPs")


def _target(asked: TargetSection, arch: Architecture, spent: Cost, unit: str,
            table: latency.Table | None = None) -> Target:
    dense = spent.whole(arch.blocks)
    limit = (asked.asked if asked.kind == "memory" else
             dense / asked.asked if asked.timed else dense * (1 - asked.asked))
    if limit >= dense:
        raise InputError(f"prune.target.memory: {asked.asked:.0f} bytes is no less than the dense "
                         f"model's {dense:.0f}, so nothing is to be pruned; lower it")
    return Target(asked, spent, limit, dense, unit, table)


def _stored(config: Mapping[str, Any]) -> int:
    value = cost.value_bytes(config)
    if value is None:
        raise InputError("prune.target.memory: config.json does not state the weights' dtype as "
                         "float32, float16 or bfloat16, so bytes are not known; add it there")
    return value


def _repaired(recipe: Recipe, config: Mapping[str, Any], arch: Architecture) -> Architecture:
    """With the most biases that the repair by biases may add."""
    if recipe.recover.method != "bias":
        return arch
    stock = config["model_type"] == "llama"
    return replace(arch, output_bias=True, down_bias=True, qkv_bias=arch.qkv_bias or stock,
                   ffn_bias=arch.ffn_bias or stock)


def settled(arch: Architecture, section: PruneSection, target: Target | None, *,
            tensor_parallel: int = 1, influence: Sequence[Influence] | None = None,
            widths_of: Callable[[PruneSection], Widths] | None = None) -> PruneSection:
    """The section with the lowest ratio at which `widths_of` it meet the target.

    `widths_of`: uniform ones by default. Costs fall as the ratio rises, but for the steps of
    rounding: of the ratios tried, the one that comes nearest to the budget is taken. Raises
    InputError, with the most that is possible, where no ratio meets it.
    """
    if target is None:
        return section.model_copy(update={"ratio": section.share})
    widths_of = widths_of or partial(uniform_widths, arch, tensor_parallel=tensor_parallel,
                                     influence=influence)
    total = cost.parameters(arch).whole(arch.blocks)

    def ratio(widths: Widths) -> float:
        return 1 - cost.parameters(arch).whole(widths) / total

    least = narrowest(arch, section, tensor_parallel=tensor_parallel, influence=influence)
    low, high = ratio(dropped(arch, section, influence).blocks), ratio(least)
    tried = section.model_copy(update={"ratio": high})
    if high <= low or target.cost.whole(least) > target.limit or (
            (spent := target.cost.whole(widths_of(tried))) > target.limit):
        raise InputError(_too_much(target, least))
    best = tried
    for _ in range(_STEPS):
        tried = section.model_copy(update={"ratio": (low + high) / 2})
        found = target.cost.whole(widths_of(tried))
        if found > target.limit:
            low = (low + high) / 2
            continue
        high = (low + high) / 2
        if found >= spent:
            spent, best = found, tried
    return best


def _too_much(target: Target, least: Widths) -> str:
    kind, asked, most = target.section.kind, target.section.asked, target.reached(least)
    if kind == "memory":
        return (f"prune.target.memory: {asked:.0f} bytes is below the {math.ceil(most)} that these "
                "settings leave at least; raise it, or let more be pruned")
    floored = math.floor(most * 1000) / 1000
    return (f"prune.target.{kind}: {asked:g} is more than these settings allow, at most "
            f"{floored:g}; lower it, or let more be pruned")


def planned(recipe: Recipe, config: Mapping[str, Any]) -> tuple[Target | None, list[BlockWidths]]:
    """The target, by the cached times, and the uniform widths that meet it (or the ratio).

    Raises InputError where none do; what is too much for uniform widths is so for all.
    """
    arch, key = architecture(config), table_key(recipe, config)
    target = find(recipe, config, latency.lookup(key) if key else None)
    parallel = recipe.hardware.tensor_parallel
    section = settled(arch, recipe.prune, target, tensor_parallel=parallel)
    return target, uniform_widths(arch, section, tensor_parallel=parallel)
