"""From scores to the groups that stay: widths by budget, and the kept indices.

Two steps, so that a plan needs no scores where the widths do not depend on them: `uniform_widths`
from the sizes alone, `global_widths` from the scores of all blocks; then `keep` takes the best
groups of each block at its width. No torch here: scores are plain sequences of floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf, lcm
from statistics import fmean, pstdev
from typing import NamedTuple

from bipdeploy.errors import InputError
from bipdeploy.model.families import Architecture, BlockWidths
from bipdeploy.pruning.depth import Influence, dropped, largest_part, unprotected
from bipdeploy.pruning.divisibility import counted, kv_head_counts, require_parallel
from bipdeploy.pruning.kept import BlockScores, Kept, keep
from bipdeploy.recipe.prune import PruneSection


class _Step(NamedTuple):
    """A block gets narrower by `size` KV heads or channels."""

    importance: float
    block: int
    size: int


@dataclass(frozen=True)
class _Choices:
    """The widths that unprotected blocks may have."""

    groups: dict[int, list[int]]  # numbers of KV heads by block, ascending from 0
    unit: int  # of FFN channels

    @property
    def blocks(self) -> list[int]:
        return list(self.groups)


def allocate(arch: Architecture, section: PruneSection, scores: Sequence[BlockScores], *,
             comparable: bool, one_scale: bool = False, tensor_parallel: int = 1,
             influence: Sequence[Influence] | None = None
             ) -> tuple[list[BlockWidths], list[Kept]]:
    """Widths and kept indices of every block. Raises InputError where the ratio cannot be met."""
    if section.layers == "uniform":
        widths = uniform_widths(arch, section, tensor_parallel=tensor_parallel,
                                influence=influence)
    else:
        widths = global_widths(arch, section, scores, comparable=comparable, one_scale=one_scale,
                               tensor_parallel=tensor_parallel, influence=influence)
    return widths, [keep(s, w) for s, w in zip(scores, widths, strict=True)]


def uniform_widths(arch: Architecture, section: PruneSection, *, tensor_parallel: int = 1,
                   influence: Sequence[Influence] | None = None) -> list[BlockWidths]:
    """The same share of heads and of channels in every unprotected block that depth leaves.

    KV groups are rounded to the nearest number that divides for tensor parallelism and from which
    FFN channels can meet the rest of the budget; these then meet it to within one rounding unit
    of every block. Without `influence` other parts are dropped, and as many. Raises InputError
    where the ratio is more than can be removed.
    """
    dense, arch = arch, dropped(arch, section, influence)
    choices = _choices(arch, section, tensor_parallel)
    budget, share = _budget(dense, arch, section, choices)
    widths = list(arch.blocks)
    if section.heads:
        start = {i: _nearest(counts, arch.blocks[i].kv_heads * (1 - share))
                 for i, counts in choices.groups.items()}

        def groups(fewer: int) -> dict[int, int]:
            return {i: counts[min(len(counts) - 1, max(start[i] - fewer, min(1, len(counts) - 1)))]
                    for i, counts in choices.groups.items()}

        most = max(map(len, choices.groups.values()))
        fewer = _fitting(0, -most, most, lambda n: _removed(arch, _with_groups(arch, groups(n))),
                         budget, _ffn_capacity(arch, section, choices))
        widths = _with_groups(arch, groups(fewer))
    if section.ffn:
        rest = budget - _removed(arch, widths)
        channels = sum(arch.blocks[i].intermediate for i in choices.blocks)
        kept_share = 1 - rest / arch.channel_parameters() / channels if channels else 1.0
        for i in choices.blocks:
            width = _rounded(arch.blocks[i].intermediate, kept_share, choices.unit)
            widths[i] = BlockWidths(widths[i].heads, widths[i].kv_heads, width)
    return widths


def global_widths(arch: Architecture, section: PruneSection, scores: Sequence[BlockScores], *,
                  comparable: bool, one_scale: bool = False, tensor_parallel: int = 1,
                  influence: Sequence[Influence] | None = None) -> list[BlockWidths]:
    """Groups of all unprotected blocks compete: heads with heads, channels with channels.

    `layers: global`: each kind gives up the same share of its parameters, as nearly as the budget
    allows. `adaptive`: one ranking of both kinds decides how much each gives up. Every block keeps
    at least one KV group (or the fewest that divide for tensor parallelism) and one rounding unit
    of channels. Scores that are not comparable between blocks are standardised within each block
    first (zero mean, unit variance; as FLAP does). Raises InputError where the ratio is more than
    can be removed.
    """
    whole, arch = arch, dropped(arch, section, influence)
    choices = _choices(arch, section, tensor_parallel)
    budget, share = _budget(whole, arch, section, choices)
    widths = list(arch.blocks)
    unit, weight = choices.unit, arch.channel_parameters()
    one_scale = one_scale or section.layers == "global"
    channels = {i: arch.blocks[i].intermediate for i in choices.blocks}
    # A dense width that is no multiple loses its odd channels with the first unit.
    narrower = _steps(_scaled({i: scores[i].ffn for i, w in channels.items() if w}, comparable,
                              one_scale),
                      {i: [w, *range((w - 1) // unit * unit, 0, -unit)]
                       for i, w in channels.items()})
    if section.heads:
        dense = {i: arch.blocks[i].kv_heads for i in choices.blocks}
        steps = _steps(_scaled({i: scores[i].heads for i, n in dense.items() if n}, comparable,
                               one_scale),
                       {i: counts[:0:-1] for i, counts in choices.groups.items()})
        left = list(accumulate((step.size for step in steps), initial=0))
        wanted = round(share * sum(dense.values()))
        start = min(range(len(left)), key=lambda n: abs(left[n] - wanted))
        if section.layers == "adaptive" and section.ffn:
            start = _competing(steps, narrower, budget, lambda step, of_heads: step.size * (
                arch.kv_group_parameters(step.block) if of_heads else weight))
        count = _fitting(
            start, 0, len(steps),
            lambda n: _removed(arch, _with_groups(arch, _after(dense, steps[:n]))), budget,
            _ffn_capacity(arch, section, choices))
        widths = _with_groups(arch, _after(dense, steps[:count]))
    if section.ffn:
        count = _nearing([step.size * weight for step in narrower],
                         budget - _removed(arch, widths))
        for i, width in _after(channels, narrower[:count]).items():
            widths[i] = BlockWidths(widths[i].heads, widths[i].kv_heads, width)
    return widths


def _competing(heads: Sequence[_Step], channels: Sequence[_Step], budget: float,
               weight: Callable[[_Step, bool], int]) -> int:
    """How many head steps leave where those and the channels' go by one ranking until the budget
    is met. `weight`: parameters of a step, which is one of heads or not."""
    ranking = sorted([(step, True) for step in heads] + [(step, False) for step in channels],
                     key=lambda entry: entry[0].importance)
    gone = _nearing([weight(*entry) for entry in ranking], budget)
    return sum(of_heads for _, of_heads in ranking[:gone])


def _nearing(sizes: Sequence[int], budget: float) -> int:
    """How many of the first sizes bring their sum as near to the budget as it comes."""
    rest = budget
    for count, size in enumerate(sizes):
        if abs(rest - size) >= abs(rest):
            return count
        rest -= size
    return len(sizes)


def possible_widths(arch: Architecture, section: PruneSection, *,
                    tensor_parallel: int = 1) -> list[BlockWidths]:
    """Widths of single blocks that stand for all that scores may lead to.

    A number that divides all of these divides every outcome: of the FFN widths only one rounding
    unit and the dense width are listed, since the others are multiples.
    """
    choices = _choices(arch, section, tensor_parallel)
    found = []
    for i, dense in enumerate(arch.blocks):
        groups, channels = [dense.kv_heads], {dense.intermediate}
        if i in choices.groups and section.heads:
            groups = choices.groups[i][1:] or groups
        if i in choices.groups and section.ffn:
            channels.add(min(choices.unit, dense.intermediate))
        found += [BlockWidths(k * dense.group, k, c) for k in groups for c in sorted(channels)]
    return found


def narrowest(arch: Architecture, section: PruneSection, *, tensor_parallel: int = 1,
              influence: Sequence[Influence] | None = None) -> list[BlockWidths]:
    """The least that may stay of every block, once depth has dropped what it drops."""
    arch = dropped(arch, section, influence)
    return _least(arch, section, _choices(arch, section, tensor_parallel))


def part_widths(arch: Architecture, section: PruneSection, *, tensor_parallel: int = 1
                ) -> Callable[[int, str], list[int]]:
    """The widths that a part ("heads", in KV heads, or "ffn", in channels) of a block may have,
    ascending; just the dense one where it is not pruned. Raises InputError as `uniform_widths`."""
    choices = _choices(arch, section, tensor_parallel)
    if section.ratio is not None:  # planning/targets.py refuses what is too much of another budget
        _budget(arch, arch, section, choices)

    def widths(block: int, part: str) -> list[int]:
        dense = arch.blocks[block]
        if part == "heads":
            allowed = choices.groups.get(block, [])[1:] if section.heads else []
            return allowed or [dense.kv_heads]
        allowed = (list(range(choices.unit, dense.intermediate, choices.unit))
                   if section.ffn and block in choices.groups else [])
        return [*allowed, dense.intermediate]

    return widths


def _steps(scores: Mapping[int, Sequence[float]],
           sizes: Mapping[int, Sequence[int]]) -> list[_Step]:
    """The steps by which blocks get narrower, the least important first.

    A step leads from one of the block's `sizes`, descending from dense, to the next. Its importance
    is the mean score of what it removes, each block giving up its own worst first.
    """
    found: list[_Step] = []
    for i, own in scores.items():
        ascending = sorted(own)
        low, importance = 0, -inf
        for size, smaller in pairwise(sizes[i]):
            high = low + size - smaller
            # A mean of equal scores may round below the one before it, which still goes first.
            importance = max(importance, fmean(ascending[low:high]))
            found.append(_Step(importance, i, high - low))
            low = high
    # Stable by block: within a block the steps are already in ascending order.
    return sorted(found, key=lambda step: step.importance)


def _after(dense: Mapping[int, int], steps: Iterable[_Step]) -> dict[int, int]:
    """Sizes by block once some steps are taken."""
    sizes = dict(dense)
    for step in steps:
        sizes[step.block] -= step.size
    return sizes


def _nearest(counts: Sequence[int], wanted: float) -> int:
    """Index of the count that is nearest to `wanted`; as `round` has it, a tie goes to even."""
    return min(range(len(counts)), key=lambda n: (abs(counts[n] - wanted), counts[n] % 2))


def _fitting(start: int, least: int, most: int, removed: Callable[[int], int], budget: float,
             capacity: int | None) -> int:
    """The step nearest to `start` from which the FFN can meet the budget; removed(step) grows.

    `capacity` is what the FFN can give up; None where it is not pruned.
    """
    if capacity is not None:
        while start > least and removed(start) > budget:
            start -= 1
        while start < most and removed(start) + capacity < budget:
            start += 1
    return start


def _with_groups(arch: Architecture, groups: dict[int, int]) -> list[BlockWidths]:
    """The dense widths with other numbers of KV groups in some blocks."""
    return [BlockWidths(groups[i] * w.group, groups[i], w.intermediate) if i in groups else w
            for i, w in enumerate(arch.blocks)]


def _scaled(scores: Mapping[int, Sequence[float]], comparable: bool,
            one_scale: bool) -> Mapping[int, Sequence[float]]:
    """Scores of one kind of group, by block, on a scale that blocks share; unless `one_scale`, on
    one that the other kind's scores have too."""
    if not comparable:
        return {i: _standardised(own) for i, own in scores.items()}
    if one_scale:
        return scores
    together = iter(_standardised([s for own in scores.values() for s in own]))
    return {i: [next(together) for _ in own] for i, own in scores.items()}


def _standardised(scores: Sequence[float]) -> list[float]:
    spread = pstdev(scores) if len(scores) > 1 else 0.0
    mean = fmean(scores) if scores else 0.0
    # Rounded, so that equal standing (of two groups, always -1 and 1) is a tie in every block.
    return [round((s - mean) / spread, 9) if spread else 0.0 for s in scores]


def _prunable(arch: Architecture, block: int, section: PruneSection) -> int:
    dense = arch.blocks[block]
    heads = dense.kv_heads * arch.kv_group_parameters(block) if dense.kv_heads else 0
    return heads * section.heads + dense.intermediate * arch.channel_parameters() * section.ffn


def _removed(arch: Architecture, widths: Sequence[BlockWidths]) -> int:
    return sum(arch.block_parameters(i) - arch.block_parameters(i, w)
               for i, w in enumerate(widths))


def _rounded(dense: int, share: float, unit: int) -> int:
    """The multiple of `unit` nearest to `dense * share`, or `dense` itself where that is nearer.

    At least one unit, or `dense` where that is less.
    """
    wanted = dense * share
    multiple = max(round(wanted / unit), 1) * unit
    if multiple > dense or abs(dense - wanted) < abs(multiple - wanted):
        return dense
    return multiple


def _choices(arch: Architecture, section: PruneSection, tensor_parallel: int) -> _Choices:
    """What divides by `tensor_parallel`. Raises InputError where the dense model does not."""
    inner = unprotected(arch, section)
    require_parallel(arch, tensor_parallel)
    return _Choices({i: kv_head_counts(arch.blocks[i], tensor_parallel) for i in inner},
                    lcm(section.round_to, tensor_parallel))


def _least(arch: Architecture, section: PruneSection, choices: _Choices) -> list[BlockWidths]:
    """Every block's fewest KV groups and one rounding unit of channels, of what is pruned."""
    fewest = {i: counts[:2][-1] for i, counts in choices.groups.items() if section.heads}
    return [BlockWidths(w.heads, w.kv_heads, min(choices.unit, w.intermediate))
            if section.ffn and i in choices.groups else w
            for i, w in enumerate(_with_groups(arch, fewest))]


def _ffn_capacity(arch: Architecture, section: PruneSection, choices: _Choices) -> int | None:
    """Parameters that FFN channels can give up; None where they are not pruned."""
    if not section.ffn:
        return None
    return sum(max(arch.blocks[i].intermediate - choices.unit, 0)
               for i in choices.blocks) * arch.channel_parameters()


def _budget(dense: Architecture, arch: Architecture, section: PruneSection,
            choices: _Choices) -> tuple[float, float]:
    """Parameters to remove from what depth left (`arch`) of `dense`, and as a share of all that
    is pruned. Raises InputError for too many.

    Every block keeps its fewest KV groups and one rounding unit of channels.
    """
    total = sum(dense.block_parameters(i) for i in range(len(dense.blocks)))
    gone = _removed(dense, arch.blocks)
    assert section.ratio is not None  # targets.py turns a target into one
    budget = section.ratio * total - gone
    if section.depth.any:
        _require_depth(section, gone / total, largest_part(dense, arch) / total)
        if not (section.heads or section.ffn):
            return 0.0, 0.0
    least = _least(arch, section, choices)
    most = _removed(arch, least)
    if budget > most * (1 + 1e-9):
        heads = max(1, *(least[i].kv_heads for i in choices.blocks))
        raise InputError(
            f"prune.ratio: {section.ratio:g} would leave a block without heads or FFN channels: "
            f"{len(choices.blocks)} of {len(arch.blocks)} blocks may be pruned, each keeps "
            f"{'one KV head' if heads == 1 else counted(heads, 'KV head')} and "
            f"{choices.unit} channels; with these settings at most "
            f"{int((most + gone) / total * 1000) / 1000:g} can be removed")
    return budget, budget / sum(_prunable(arch, i, section) for i in choices.blocks)


def _require_depth(section: PruneSection, gone: float, part: float) -> None:
    """Raise InputError where the share that depth removes does not go with `prune.ratio`.

    It must leave something to the widths or, where these are not pruned, meet the ratio itself to
    within one dropped part.
    """
    assert section.ratio is not None
    share = f"prune.depth drops {gone:.3g} of the parameters, and prune.ratio is {section.ratio:g}"
    if section.heads or section.ffn:
        if gone >= section.ratio:
            raise InputError(f"{share}: nothing is left for heads and channels to give; lower "
                             "depth, raise the ratio, or set heads and ffn to false")
    elif abs(gone - section.ratio) >= part:
        raise InputError(f"{share}, which depth alone has to meet, since heads and ffn are false; "
                         f"change depth, or set ratio to {gone:.3g}")
