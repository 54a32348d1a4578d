"""`prune.target`: from a budget in FLOPs, bytes or seconds to the ratio whose widths meet it.

No torch: what is exact is known from config.json, and times come from the cached table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bipdeploy.errors import InputError
from bipdeploy.model import cost
from bipdeploy.model.cost import Cost
from bipdeploy.model.families import Architecture, BlockWidths
from bipdeploy.planning import latency
from bipdeploy.pruning.allocation import narrowest, uniform_widths
from bipdeploy.pruning.depth import Influence, dropped
from bipdeploy.recipe.prune import PruneSection
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.recipe.target import TargetSection
from bipdeploy.table import Row, by_name

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


def find(recipe: Recipe, config: Mapping[str, Any], arch: Architecture,
         table: latency.Table | None) -> Target | None:
    """The budget that a recipe asks for; None where it is a share of the parameters.

    Without a `table` a speed-up is judged by what bounds it at best: the bytes that a decode step
    reads, the FLOPs of a prefill. That is for plans alone. Raises InputError where a budget is no
    less than what the dense model costs.
    """
    asked = recipe.prune.target
    if asked is None or asked.kind == "parameters":
        return None
    spent, unit = TARGETS[asked.kind].load()(recipe, config, arch, table)
    dense = spent.whole(arch.blocks)
    limit = (asked.asked if asked.kind == "memory" else
             dense / asked.asked if asked.timed else dense * (1 - asked.asked))
    if limit >= dense:
        raise InputError(f"prune.target.memory: {asked.asked:.0f} bytes is no less than the dense "
                         f"model's {dense:.0f}, so nothing is to be pruned; lower it")
    return Target(asked, spent, limit, dense, unit, table)


Spent = tuple[Cost, str]  # what widths cost, and in what unit


def parameters(recipe: Recipe, config: Mapping[str, Any], arch: Architecture,
               table: latency.Table | None) -> Spent:
    """Parameters of the blocks."""
    return cost.parameters(arch), "parameters"


def flops(recipe: Recipe, config: Mapping[str, Any], arch: Architecture,
          table: latency.Table | None) -> Spent:
    """FLOPs of the blocks in the target's prefill."""
    assert recipe.prune.target
    return cost.flops(arch, recipe.prune.target.tokens), "FLOPs"


def memory(recipe: Recipe, config: Mapping[str, Any], arch: Architecture,
           table: latency.Table | None) -> Spent:
    """Bytes of the exported weights and of the target's KV cache."""
    asked = recipe.prune.target
    assert asked
    return cost.memory(_repaired(recipe, config, arch), _stored(config),
                       asked.batch * asked.tokens), "bytes"


def decode(recipe: Recipe, config: Mapping[str, Any], arch: Architecture,
           table: latency.Table | None) -> Spent:
    """Seconds of one decode step, or what it reads where there are no times."""
    asked = recipe.prune.target
    assert asked
    if table:
        return table.phases["decode"].cost, "seconds"
    spent = cost.memory(arch, 2, asked.batch * asked.tokens)
    outside = 0 if arch.tied else 2 * arch.vocabulary * arch.hidden  # rows that are not read
    return replace(spent, rest=spent.rest - outside), "bytes read"


def prefill(recipe: Recipe, config: Mapping[str, Any], arch: Architecture,
            table: latency.Table | None) -> Spent:
    """Seconds of a prefill, or its FLOPs where there are no times."""
    asked = recipe.prune.target
    assert asked
    if table:
        return table.phases["prefill"].cost, "seconds"
    return replace(cost.flops(arch, asked.tokens), rest=cost.head_flops(arch, 1)), "FLOPs"


def _without_dtype(resolved: Any) -> None:
    _stored(resolved.config)


# Names are the fields of the recipe's `prune.target`; `needs`: `dtype` in config.json, or `times`
# measured on this machine. A function gives what widths cost.
TARGETS = by_name(
    Row("parameters", (), None, "bipdeploy.planning.targets:parameters"),
    Row("flops", (), None, "bipdeploy.planning.targets:flops"),
    Row("memory", ("dtype",), _without_dtype, "bipdeploy.planning.targets:memory"),
    Row("decode_speedup", ("times",), None, "bipdeploy.planning.targets:decode"),
    Row("prefill_speedup", ("times",), None, "bipdeploy.planning.targets:prefill"),
)


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
