"""From scores to the groups that stay: widths by budget, and the kept indices.

Two steps, so that a plan needs no scores where the widths do not depend on them: `uniform_widths`
from the sizes alone, `global_widths` from the scores of all blocks; then `keep` takes the best
groups of each block at its width. No torch here: scores are plain sequences of floats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

from bipdeploy.errors import InputError
from bipdeploy.families import Architecture, BlockWidths
from bipdeploy.recipe import PruneSection


@dataclass(frozen=True)
class BlockScores:
    """Scores of one block's KV groups and FFN channels; higher is kept."""

    heads: Sequence[float]
    ffn: Sequence[float]


@dataclass(frozen=True)
class Kept:
    """Indices that stay in one block, ascending: KV groups and FFN channels."""

    groups: tuple[int, ...]
    channels: tuple[int, ...]


def allocate(arch: Architecture, section: PruneSection, scores: Sequence[BlockScores], *,
             comparable: bool) -> tuple[list[BlockWidths], list[Kept]]:
    """Widths and kept indices of every block. Raises InputError where the ratio cannot be met."""
    if section.layers == "uniform":
        widths = uniform_widths(arch, section)
    else:
        widths = global_widths(arch, section, scores, comparable=comparable)
    return widths, [keep(s, w) for s, w in zip(scores, widths, strict=True)]


def unprotected(arch: Architecture, section: PruneSection) -> list[int]:
    """Indices of the blocks that may be pruned."""
    count = len(arch.blocks)
    inner = list(range(section.protect.first, count - section.protect.last))
    if not inner:
        raise InputError(f"prune.protect: first {section.protect.first} and last "
                         f"{section.protect.last} leave no block of {count} to prune; lower them")
    return inner


def uniform_widths(arch: Architecture, section: PruneSection) -> list[BlockWidths]:
    """The same share of heads and of channels in every unprotected block.

    KV groups are rounded to the nearest whole from which FFN channels can meet the rest of the
    budget; these then meet it to within one rounding unit of every block. Raises InputError where
    the ratio is more than can be removed.
    """
    inner = unprotected(arch, section)
    budget, share = _budget(arch, section, inner)
    widths = list(arch.blocks)
    if section.heads:
        kv = {i: arch.blocks[i].kv_heads for i in inner}

        def groups(fewer: int) -> dict[int, int]:
            return {i: min(k, max(round(k * (1 - share)) - fewer, min(1, k)))
                    for i, k in kv.items()}

        most = max(kv.values())
        fewer = _fitting(0, -most, most, lambda n: _removed(arch, _with_groups(arch, groups(n))),
                         budget, _ffn_capacity(arch, section, inner))
        widths = _with_groups(arch, groups(fewer))
    if section.ffn:
        rest = budget - _removed(arch, widths)
        channels = sum(arch.blocks[i].intermediate for i in inner)
        kept_share = 1 - rest / arch.channel_parameters() / channels if channels else 1.0
        for i in inner:
            width = _rounded(arch.blocks[i].intermediate, kept_share, section.round_to)
            widths[i] = BlockWidths(widths[i].heads, widths[i].kv_heads, width)
    return widths


def global_widths(arch: Architecture, section: PruneSection, scores: Sequence[BlockScores], *,
                  comparable: bool) -> list[BlockWidths]:
    """Groups of all unprotected blocks compete: heads with heads, channels with channels.

    Each kind gives up the same share of its parameters, as nearly as the budget allows. Every
    block keeps at least one KV group and one rounding unit of channels. Scores that are not
    comparable between blocks are standardised within each block first (zero mean, unit variance;
    as FLAP does). Raises InputError where the ratio is more than can be removed.
    """
    inner = unprotected(arch, section)
    budget, share = _budget(arch, section, inner)
    widths = list(arch.blocks)
    if section.heads:
        ranked = _removable_groups({i: scores[i].heads for i in inner}, comparable)

        def groups(count: int) -> dict[int, int]:
            return {i: arch.blocks[i].kv_heads - ranked[:count].count(i) for i in inner}

        wanted = round(share * sum(arch.blocks[i].kv_heads for i in inner))
        count = _fitting(min(wanted, len(ranked)), 0, len(ranked),
                         lambda n: _removed(arch, _with_groups(arch, groups(n))), budget,
                         _ffn_capacity(arch, section, inner))
        widths = _with_groups(arch, groups(count))
    if section.ffn:
        for i, width in _global_channels(arch, section, scores, inner, comparable,
                                         budget - _removed(arch, widths)).items():
            widths[i] = BlockWidths(widths[i].heads, widths[i].kv_heads, width)
    return widths


def _global_channels(arch: Architecture, section: PruneSection, scores: Sequence[BlockScores],
                     inner: list[int], comparable: bool, rest: float) -> dict[int, int]:
    """FFN widths by block: whole rounding units leave, the least important unit first.

    A unit's importance is the mean score of its channels, each block giving up its own worst
    channels first. A dense width that is no multiple loses its odd channels with the first unit.
    """
    unit, weight = section.round_to, arch.channel_parameters()
    standard = scores if comparable else [
        BlockScores(s.heads, _standardised(s.ffn)) for s in scores]
    width = {i: arch.blocks[i].intermediate for i in inner}
    units: list[tuple[float, int, int]] = []
    for i in inner:
        ascending = sorted(standard[i].ffn)
        low, left = 0, width[i]
        while left > unit:
            step = left % unit or unit
            units.append((fmean(ascending[low:low + step]), i, step))
            low, left = low + step, left - step
    # Stable by block: within a block the units are already in ascending order.
    units.sort(key=lambda entry: entry[0])
    for _, i, step in units:
        if abs(rest - step * weight) >= abs(rest):
            break
        width[i] -= step
        rest -= step * weight
    return width


def keep(scores: BlockScores, widths: BlockWidths) -> Kept:
    """The best groups and channels of a block at the given widths; ties go to the lower index."""
    return Kept(_best(scores.heads, widths.kv_heads), _best(scores.ffn, widths.intermediate))


def _best(scores: Sequence[float], count: int) -> tuple[int, ...]:
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return tuple(sorted(order[:count]))


def _removable_groups(by_block: dict[int, Sequence[float]], comparable: bool) -> list[int]:
    """The block of every group that may leave, least important first: all but each block's best."""
    ranked = sorted((score, i) for i, scores in by_block.items()
                    for score in sorted(scores if comparable else _standardised(scores))[:-1])
    return [i for _, i in ranked]


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


def _ffn_capacity(arch: Architecture, section: PruneSection, inner: list[int]) -> int | None:
    """Parameters that FFN channels can give up; None where they are not pruned."""
    if not section.ffn:
        return None
    return sum(max(arch.blocks[i].intermediate - section.round_to, 0)
               for i in inner) * arch.channel_parameters()


def _budget(arch: Architecture, section: PruneSection, inner: list[int]) -> tuple[float, float]:
    """Parameters to remove, and as a share of all that is pruned. Raises InputError for too many.

    Every block keeps one KV group and one rounding unit of channels.
    """
    total = sum(arch.block_parameters(i) for i in range(len(arch.blocks)))
    budget = section.ratio * total
    most = _ffn_capacity(arch, section, inner) or 0
    if section.heads:
        most += sum(max(arch.blocks[i].kv_heads - 1, 0) * arch.kv_group_parameters(i)
                    for i in inner)
    if budget > most:
        raise InputError(
            f"prune.ratio: {section.ratio:g} would leave a block without heads or FFN channels: "
            f"{len(inner)} of {len(arch.blocks)} blocks may be pruned, each keeps one KV head and "
            f"{section.round_to} channels; with these settings at most "
            f"{int(most / total * 1000) / 1000:g} can be removed")
    return budget, budget / sum(_prunable(arch, i, section) for i in inner)
