"""What stays of a block: KV groups, query heads within them, FFN channels. No torch here.

Query heads leave by the same number from every KV group, so that what is left is regular
grouped-query attention; which ones leave may differ from group to group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bipdeploy.model.families import BlockWidths


@dataclass(frozen=True)
class BlockScores:
    """Scores of one block's KV groups, FFN channels and query heads; higher is kept.

    Query heads stand group by group; none are known where only whole KV groups leave.
    """

    heads: Sequence[float]
    ffn: Sequence[float]
    queries: Sequence[float] = ()


@dataclass(frozen=True)
class Kept:
    """Indices that stay in one block, ascending: KV groups, FFN channels, and for each kept group
    the query heads, which count within it; () where all of them stay."""

    groups: tuple[int, ...]
    channels: tuple[int, ...]
    queries: tuple[tuple[int, ...], ...] = ()

    def query_heads(self, group: int) -> tuple[int, ...]:
        """The query heads that stay, counted in the block, where a KV head has `group` of them."""
        within = self.queries or (range(group),) * len(self.groups)
        return tuple(own * group + i for own, heads in zip(self.groups, within, strict=True)
                     for i in heads)

    def then(self, inner: Kept) -> Kept:
        """What stays of these once `inner`, which counts within them, is what stays."""
        queries = inner.queries
        if self.queries:
            before = [self.queries[i] for i in inner.groups]
            queries = tuple(before) if not inner.queries else tuple(
                tuple(own[i] for i in heads)
                for own, heads in zip(before, inner.queries, strict=True))
        return Kept(tuple(self.groups[i] for i in inner.groups),
                    tuple(self.channels[i] for i in inner.channels), queries)


def keep(scores: BlockScores, widths: BlockWidths) -> Kept:
    """The best groups and channels of a block at the given widths; ties go to the lower index.

    Where query heads are scored, each kept group keeps its best ones, as many as the widths say.
    """
    groups = _best(scores.heads, widths.kv_heads)
    queries: tuple[tuple[int, ...], ...] = ()
    per_group = len(scores.queries) // len(scores.heads) if scores.heads else 0
    if groups and widths.group < per_group:
        queries = tuple(_best(scores.queries[g * per_group:(g + 1) * per_group], widths.group)
                        for g in groups)
    return Kept(groups, _best(scores.ffn, widths.intermediate), queries)


def _best(scores: Sequence[float], count: int) -> tuple[int, ...]:
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return tuple(sorted(order[:count]))
