"""From scores to the groups that stay: widths by budget, and the kept indices.

Two steps, so that a plan needs no scores where the widths do not depend on them: `uniform_widths`
from the sizes alone, `global_widths` from the scores of all blocks; then `keep` takes the best
groups of each block at its width. No torch here: scores are plain sequences of floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from math import inf
from statistics import fmean, pstdev
from typing import NamedTuple

from bipdeploy.errors import InputError
from bipdeploy.model.families import Architecture, BlockWidths, Heads, Width
from bipdeploy.pruning.choices import Choices, choices_of, ladder, least, with_heads
from bipdeploy.pruning.depth import Influence, dropped, largest_part
from bipdeploy.pruning.divisibility import counted
from bipdeploy.pruning.kept import BlockScores, Kept, keep
from bipdeploy.recipe.prune import PruneSection


class _Step(NamedTuple):
    """A block gets narrower by `size` KV heads or channels."""

    importance: float
    block: int
    size: int


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

    Heads are rounded to the nearest that divide for tensor parallelism and from which FFN channels
    can meet the rest of the budget; these then meet it to within one rounding unit of every block.
    Where query heads may leave, nearest is what has the nearest number of parameters, see
    `choices.ladder`. Without `influence` other parts are dropped, and as many. Raises InputError
    where the ratio is more than can be removed.
    """
    dense, arch = arch, dropped(arch, section, influence)
    choices = choices_of(arch, section, tensor_parallel)
    budget, share = _budget(dense, arch, section, choices)
    widths = list(arch.blocks)
    if section.heads:
        ladders = {i: ladder(arch, i, own) for i, own in choices.heads.items()}
        start = {i: _nearest(own, _wanted(arch, i, section, share)) for i, own in ladders.items()}
        steps = {i: list(own.values()) for i, own in ladders.items()}

        def heads(fewer: int) -> dict[int, Heads]:
            return {i: own[min(len(own) - 1, max(start[i] - fewer, min(1, len(own) - 1)))]
                    for i, own in steps.items()}

        most = max(map(len, steps.values()))
        fewer = _fitting(0, -most, most, lambda n: _removed(arch, with_heads(arch, heads(n))),
                         budget, _ffn_capacity(arch, section, choices))
        widths = with_heads(arch, heads(fewer))
    if section.ffn:
        rest = budget - _removed(arch, widths)
        channels = sum(arch.blocks[i].intermediate for i in choices.blocks)
        kept_share = 1 - rest / arch.channel_parameters() / channels if channels else 1.0
        for i in choices.blocks:
            widths[i] = widths[i].having(
                _rounded(arch.blocks[i].intermediate, kept_share, choices.unit))
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
    choices = choices_of(arch, section, tensor_parallel)
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
                       {i: [own.kv for own in choices.heads[i][:0:-1]] for i in dense})

        def left_of(count: int) -> dict[int, Heads]:
            return {i: Heads(kv, arch.blocks[i].group if kv else 0)
                    for i, kv in _after(dense, steps[:count]).items()}

        left = list(accumulate((step.size for step in steps), initial=0))
        wanted = round(share * sum(dense.values()))
        start = min(range(len(left)), key=lambda n: abs(left[n] - wanted))
        if section.layers == "adaptive" and section.ffn:
            start = _competing(steps, narrower, budget, lambda step, of_heads: step.size * (
                arch.kv_group_parameters(step.block) if of_heads else weight))
        count = _fitting(
            start, 0, len(steps),
            lambda n: _removed(arch, with_heads(arch, left_of(n))), budget,
            _ffn_capacity(arch, section, choices))
        widths = with_heads(arch, left_of(count))
    if section.ffn:
        count = _nearing([step.size * weight for step in narrower],
                         budget - _removed(arch, widths))
        for i, width in _after(channels, narrower[:count]).items():
            widths[i] = widths[i].having(width)
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


def narrowest(arch: Architecture, section: PruneSection, *, tensor_parallel: int = 1,
              influence: Sequence[Influence] | None = None) -> list[BlockWidths]:
    """The least that may stay of every block, once depth has dropped what it drops."""
    arch = dropped(arch, section, influence)
    return least(arch, section, choices_of(arch, section, tensor_parallel))


def part_widths(arch: Architecture, section: PruneSection, *, tensor_parallel: int = 1
                ) -> Callable[[int, str], list[Width]]:
    """The widths that a part ("heads" or "ffn") of a block may have, ascending; just the dense one
    where it is not pruned. Raises InputError as `uniform_widths`."""
    choices = choices_of(arch, section, tensor_parallel)
    if section.ratio is not None:  # planning/targets.py refuses what is too much of another budget
        _budget(arch, arch, section, choices)

    def widths(block: int, part: str) -> list[Width]:
        dense = arch.blocks[block]
        if part == "heads":
            allowed = choices.heads.get(block, [])[1:] if section.heads else []
            return [*allowed] or [dense.attention]
        narrower = (range(choices.unit, dense.intermediate, choices.unit)
                    if section.ffn and block in choices.heads else ())
        return [*narrower, dense.intermediate]

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


def _wanted(arch: Architecture, block: int, section: PruneSection, share: float) -> float:
    """What is to stay of a block's attention once a share of what may leave has left, in the
    parameters of a KV head with all its query heads."""
    kv_heads = arch.blocks[block].kv_heads
    stays = 0.0
    if section.heads == "query" and kv_heads:
        stays = kv_heads * arch.kv_group_parameters(block, 0) / arch.kv_group_parameters(block)
    return stays + (kv_heads - stays) * (1 - share)


def _nearest(ladder: Mapping[float, Heads], wanted: float) -> int:
    """Index of the heads whose size is nearest to `wanted`; as `round` has it, a tie goes to even
    KV heads."""
    distances = [(abs(size - wanted), heads.kv % 2) for size, heads in ladder.items()]
    return distances.index(min(distances))


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
    heads = dense.kv_heads * arch.kv_group_parameters(block) if section.heads else 0
    if section.heads == "query":
        heads -= dense.kv_heads * arch.kv_group_parameters(block, 0)
    return heads + dense.intermediate * arch.channel_parameters() * section.ffn


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


def _ffn_capacity(arch: Architecture, section: PruneSection, choices: Choices) -> int | None:
    """Parameters that FFN channels can give up; None where they are not pruned."""
    if not section.ffn:
        return None
    return sum(max(arch.blocks[i].intermediate - choices.unit, 0)
               for i in choices.blocks) * arch.channel_parameters()


def _budget(dense: Architecture, arch: Architecture, section: PruneSection,
            choices: Choices) -> tuple[float, float]:
    """Parameters to remove from what depth left (`arch`) of `dense`, and as a share of all that
    is pruned. Raises InputError for too many.

    Every block keeps its fewest heads and one rounding unit of channels.
    """
    total = sum(dense.block_parameters(i) for i in range(len(dense.blocks)))
    gone = _removed(dense, arch.blocks)
    assert section.ratio is not None  # targets.py turns a target into one
    budget = section.ratio * total - gone
    if section.depth.any:
        _require_depth(section, gone / total, largest_part(dense, arch) / total)
        if not (section.heads or section.ffn):
            return 0.0, 0.0
    fewest = least(arch, section, choices)
    most = _removed(arch, fewest)
    if budget > most * (1 + 1e-9):
        heads = max(1, *(fewest[i].kv_heads for i in choices.blocks))
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
