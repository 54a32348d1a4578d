"""Scores of all blocks on one scale: what removing their groups costs the model's output.

A score tells groups of one block apart by an error at that block's output; what such an error does
to the model's output differs by block. The curves that a search measures (`curves.py`) say what
it does at some widths, and one of them sets the scale of each part's scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bipdeploy.model.families import Architecture, Heads
from bipdeploy.pruning.kept import BlockScores
from bipdeploy.pruning.search import Curve


def weighted(arch: Architecture, scores: Sequence[BlockScores], curves: Sequence[Curve]
             ) -> list[BlockScores]:
    """Scores of KV heads and channels in nats per token, by block: so scaled that those of the
    worse half of a part add up to what its curve has at half the width. Parts that are not pruned
    have no scores here that mean anything."""
    found = list(scores)
    for curve in curves:
        own, dense = found[curve.block], arch.blocks[curve.block]
        values = getattr(own, curve.part)
        left = len(values) // 2
        cost = curve.at(Heads(left, dense.group) if curve.part == "heads" else left)
        gone = sum(sorted(values)[:len(values) - left])
        scaled = [s * cost / gone if gone else 0.0 for s in values]
        found[curve.block] = replace(own, **{curve.part: scaled})
    return found
