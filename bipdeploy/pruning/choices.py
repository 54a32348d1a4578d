"""The widths that a block may have: what divides, and the least that stays. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm

from bipdeploy.model.families import Architecture, BlockWidths, Heads
from bipdeploy.pruning.depth import unprotected
from bipdeploy.pruning.divisibility import head_choices, require_parallel
from bipdeploy.recipe.prune import PruneSection


@dataclass(frozen=True)
class Choices:
    """The widths that unprotected blocks may have."""

    heads: dict[int, list[Heads]]  # by block, the fewest first, from none
    unit: int  # of FFN channels

    @property
    def blocks(self) -> list[int]:
        return list(self.heads)


def choices_of(arch: Architecture, section: PruneSection, tensor_parallel: int) -> Choices:
    """What divides by `tensor_parallel`. Raises InputError where the dense model does not."""
    inner = unprotected(arch, section)
    require_parallel(arch, tensor_parallel)
    return Choices({i: head_choices(arch.blocks[i], tensor_parallel, section.heads or "kv")
                    for i in inner}, lcm(section.round_to, tensor_parallel))


def least(arch: Architecture, section: PruneSection, choices: Choices) -> list[BlockWidths]:
    """Every block's fewest heads and one rounding unit of channels, of what is pruned."""
    fewest = {i: own[:2][-1] for i, own in choices.heads.items() if section.heads}
    return [w.having(min(choices.unit, w.intermediate))
            if section.ffn and i in choices.heads else w
            for i, w in enumerate(with_heads(arch, fewest))]


def with_heads(arch: Architecture, heads: Mapping[int, Heads]) -> list[BlockWidths]:
    """The dense widths with other attentions in some blocks."""
    return [w.having(heads[i]) if i in heads else w for i, w in enumerate(arch.blocks)]


def ladder(arch: Architecture, block: int, allowed: Sequence[Heads]) -> dict[float, Heads]:
    """What may stay of a block's attention by its parameters, ascending: in those of a KV head with
    all its query heads, to a thousandth. Of two that weigh the same the one with more query heads,
    which has fewer KV heads and a smaller cache."""
    whole = arch.kv_group_parameters(block)
    sized = sorted((round(own.kv * arch.kv_group_parameters(block, own.queries) / whole, 3),
                    own.total, own) for own in allowed)
    return {size: own for size, _, own in sized}


def possible_widths(arch: Architecture, section: PruneSection, *,
                    tensor_parallel: int = 1) -> list[BlockWidths]:
    """Widths of single blocks that stand for all that scores may lead to.

    A number that divides all of these divides every outcome: of the FFN widths only one rounding
    unit and the dense width are listed, since the others are multiples.
    """
    choices = choices_of(arch, section, tensor_parallel)
    found = []
    for i, dense in enumerate(arch.blocks):
        heads, channels = [dense.attention], {dense.intermediate}
        if i in choices.heads and section.heads:
            heads = choices.heads[i][1:] or heads
        if i in choices.heads and section.ffn:
            channels.add(min(choices.unit, dense.intermediate))
        found += [BlockWidths(h.total, h.kv, c) for h in heads for c in sorted(channels)]
    return found
