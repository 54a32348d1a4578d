"""The whole model with any width of every part put in, to judge widths together.

Every part is cut to a few widths and refitted once, in the dense model, as for `curves.py`; what
those give is then put in the places of the dense parts, in any combination. Unlike a walk this
holds the whole model, and beside it the output projections of all widths: a search asks for
thousands of passes.

Shapes as in `curves.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bipdeploy.model import finite
from bipdeploy.model.blocks import Block, BlockWalker
from bipdeploy.model.families import BlockWidths, Width
from bipdeploy.pruning.curves import Part, Text, Widths, divergence
from bipdeploy.pruning.kept import BlockScores

Reduced = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Stitched:
    """The blocks, what takes the place of each part by its width, and the windows that are judged:
    embedded [1, T, D], and as they leave the last dense block."""

    blocks: Sequence[Block]
    variants: Sequence[Mapping[str, Mapping[Width, Reduced]]]
    head: torch.nn.Module
    embedded: Sequence[torch.Tensor]
    dense: Sequence[torch.Tensor]
    batch: int  # windows that run together

    @torch.no_grad()
    def divergence(self, widths: Sequence[BlockWidths], share: float = 1.0) -> float:
        """Mean Kullback-Leibler divergence of the next-token distributions from the dense model's,
        nats per token, on the first `share` of the windows. `widths`: of every block, each part
        dense or of a width that was prepared."""
        count, total = max(1, round(share * len(self.embedded))), 0.0
        for start in range(0, count, self.batch):
            own = slice(start, min(start + self.batch, count))
            y = self.head(self._through(torch.cat(list(self.embedded[own])), widths))
            expected = self.head(torch.cat(list(self.dense[own])))
            total += divergence(y.float().log_softmax(-1), expected.float().log_softmax(-1))
        found = total / (count * self.embedded[0].shape[1])
        finite.require("divergences of the whole model", [found], self.dense[0].dtype)
        return found

    def _through(self, x: torch.Tensor, widths: Sequence[BlockWidths]) -> torch.Tensor:
        for block, own, width in zip(self.blocks, self.variants, widths, strict=True):
            if block.has_attention:
                attended = block.attention(x)
                reduced = own["heads"].get(width.attention)
                x = x + reduced(attended.z) if reduced else attended.u
            if block.has_ffn:
                gate, up = block.ffn_parts(x)
                x = x + own["ffn"].get(width.intermediate, block.down)(gate * up)
        return x


@torch.no_grad()
def stitched(walker: BlockWalker, text: Text, scores: Sequence[BlockScores], widths: Widths,
             advance: Callable[[], None] = lambda: None) -> Stitched:
    """All parts at the widths that `widths(block, part)` says, refitted where the text has a ridge.
    One walk through the dense model; `advance` is told of every block."""
    hidden = walker.embed(text.batches)
    judged = len(text.judged)
    embedded = torch.cat(list(hidden[number] for number in range(judged))).split(1)
    blocks, variants = [], []
    for index, block in enumerate(walker.blocks(text.length)):
        parts: dict[str, Part] = {}
        if block.has_attention:
            parts["heads"] = Part(walker, index, "heads", block.output, scores[index], text)
        if block.has_ffn:
            parts["ffn"] = Part(walker, index, "ffn", block.down, scores[index], text)
        for number in range(len(hidden)):
            x = hidden[number]
            if block.has_attention:
                attended = block.attention(x)
                x = attended.u
                if number >= judged:
                    parts["heads"].fit(attended.z)
            if block.has_ffn:
                gate, up = block.ffn_parts(x)
                h = gate * up
                x = x + block.down(h)
                if number >= judged:
                    parts["ffn"].fit(h)
            hidden[number] = x
        variants.append({name: {width: part.reduced(width)
                                for width in part.below(widths(index, name))}
                         for name, part in parts.items()})
        blocks.append(block)
        advance()
    dense = torch.cat([hidden[number] for number in range(judged)]).split(1)
    return Stitched(blocks, variants, walker.head(), embedded, dense, len(text.judged[0]))
