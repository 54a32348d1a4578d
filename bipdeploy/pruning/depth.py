"""Depth: whole attentions, FFNs or blocks leave, those with the least influence first.

Influence is 1 - mean cosine of a part's input and output on the residual stream: of blocks as in
ShortGPT (arXiv 2403.03853), of attentions and FFNs as in "What matters in transformers" (arXiv
2406.15786). All are taken of the dense model, once. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bipdeploy.errors import InputError
from bipdeploy.model.families import Architecture, BlockWidths
from bipdeploy.recipe.prune import PruneSection


@dataclass(frozen=True)
class Influence:
    """How much a block's attention, its FFN, and the whole block turn the residual stream."""

    attention: float
    ffn: float
    block: float


def unprotected(arch: Architecture, section: PruneSection) -> list[int]:
    """Indices of the blocks that may be pruned."""
    count = len(arch.blocks)
    inner = list(range(section.protect.first, count - section.protect.last))
    if not inner:
        raise InputError(f"prune.protect: first {section.protect.first} and last "
                         f"{section.protect.last} leave no block of {count} to prune; lower them")
    return inner


def dropped(arch: Architecture, section: PruneSection,
            influence: Sequence[Influence] | None = None) -> Architecture:
    """The model without what `prune.depth` drops: blocks first, then attentions, then FFNs.

    Before scoring there is no influence: then the first unprotected ones stand in for those that
    will leave. Raises InputError where more is asked for than there is.
    """
    inner, blocks = unprotected(arch, section), list(arch.blocks)
    known = influence or [Influence(0, 0, 0)] * len(blocks)

    def drop(field: str, count: int, scores: Sequence[float], keep: BlockWidths) -> None:
        """`keep` has ones where a width stays and zeros where it goes."""
        able = [i for i in inner if _masked(blocks[i], keep) != blocks[i]]
        if count > len(able):
            raise InputError(f"prune.depth.{field}: {count} are to be dropped, and unprotected "
                             f"blocks have {len(able)} left; lower it")
        for i in sorted(able, key=lambda i: (scores[i], i))[:count]:
            blocks[i] = _masked(blocks[i], keep)

    drop("blocks", section.depth.blocks, [s.block for s in known], BlockWidths(0, 0, 0))
    drop("attention", section.depth.attention, [s.attention for s in known], BlockWidths(0, 0, 1))
    drop("ffn", section.depth.ffn, [s.ffn for s in known], BlockWidths(1, 1, 0))
    for part, field in (("attention", "kv_heads"), ("FFN", "intermediate")):
        if not any(getattr(b, field) for b in blocks) and section.depth.any:
            raise InputError(f"prune.depth: no {part} of the model would be left; lower the counts")
    return replace(arch, blocks=tuple(blocks))


def _masked(widths: BlockWidths, keep: BlockWidths) -> BlockWidths:
    return BlockWidths(widths.heads * keep.heads, widths.kv_heads * keep.kv_heads,
                       widths.intermediate * keep.intermediate)


def largest_part(arch: Architecture, cut: Architecture) -> int:
    """Parameters of the largest loss of one block between a model and what depth left of it."""
    return max(arch.block_parameters(i) - cut.block_parameters(i) for i in range(len(arch.blocks)))


# Of each part what is left of a block without it, as a factor of the dense widths.
_LEFT = {"blocks": (0, 0), "attention": (0, 1), "ffn": (1, 0)}


def droppable(arch: Architecture, section: PruneSection, part: str, ratio: float) -> int:
    """How many blocks, attentions or FFNs weigh less than the ratio: at most half of them, so that
    widths can make up the rest. Raises InputError where one already weighs more."""
    inner = unprotected(arch, section)
    heads, channels = _LEFT[part]
    size = max(arch.block_parameters(i) - arch.block_parameters(i, BlockWidths(
        arch.blocks[i].heads * heads, arch.blocks[i].kv_heads * heads,
        arch.blocks[i].intermediate * channels)) for i in inner)
    total = sum(arch.block_parameters(i) for i in range(len(arch.blocks)))
    count = min(math.ceil(ratio * total / size) - 1, len(inner) // 2)
    if count < 1:
        raise InputError(f"compare: depth:{part} at ratio {ratio:g} drops nothing, since one is "
                         f"{size / total:.3g} of the parameters; raise the ratio or leave it out")
    return count
