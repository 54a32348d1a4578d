"""A frozen model whose groups' outputs are multiplied by numbers that are trained.

A head's output is what goes into its columns of o_proj, a channel's what goes into its column of
down_proj, so that a multiplier of 0 is the group's removal, and any other can be written into
those columns.

Shapes: G KV heads of a block, q query heads of each or 1 for all, e the size of a head, F channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from bipdeploy.model.families import Architecture
from bipdeploy.recipe.tune import slice_tokens
from bipdeploy.tuning import losses, students

Multipliers = Mapping[Any, torch.Tensor]  # by block and part, (3, "heads") or (3, "ffn")


def columns(multipliers: torch.Tensor, arch: Architecture, block: int) -> torch.Tensor:
    """Multipliers [G, q], [G, 1] or [F], one for each input of the projection: [H*e] or [F]."""
    if multipliers.ndim == 1:
        return multipliers
    heads = multipliers.expand(-1, arch.blocks[block].group)
    return heads.reshape(-1).repeat_interleave(arch.head_dim)


def straight_through(multipliers: torch.Tensor, standings: torch.Tensor, mask: torch.Tensor
                     ) -> torch.Tensor:
    """The multipliers where the mask is 1, and 0 elsewhere. The standings, which the mask was made
    from, get the gradient that the mask itself would have (arXiv 1308.3432), those of what left
    too, so that it can come back."""
    return multipliers * mask + multipliers.detach() * (standings - standings.detach())


class Multiplied:
    """A causal language model with a multiplier on the groups of some parts, and without."""

    def __init__(self, model: Any, arch: Architecture):
        self.model, self._arch = model, arch
        self._used: Multipliers = {}
        for block, layer in enumerate(students.blocks(model)):
            for part, module in (("heads", getattr(layer.self_attn, "o_proj", None)),
                                 ("ffn", getattr(layer.mlp, "down_proj", None))):
                if module is not None:
                    module.register_forward_pre_hook(partial(self._multiply, (block, part)))

    def _multiply(self, place: tuple[int, str], _: Any, inputs: tuple[torch.Tensor, ...]
                  ) -> tuple[torch.Tensor, ...]:
        own = self._used.get(place)
        if own is None:
            return inputs
        return inputs[0] * columns(own, self._arch, place[0]).to(inputs[0].dtype), *inputs[1:]

    @contextmanager
    def by(self, multipliers: Multipliers) -> Iterator[Any]:
        """The model with these multipliers; parts that are not named are as they were."""
        self._used = multipliers
        try:
            yield self.model
        finally:
            self._used = {}

    def divergence(self, ids: torch.Tensor, multipliers: Multipliers) -> torch.Tensor:
        """KL(dense || multiplied) of the next-token distributions after windows [B, T], summed
        over their tokens, in nats."""
        head = self.model.get_output_embeddings()
        with torch.no_grad():
            dense = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        with self.by(multipliers) as model:
            own = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return losses.in_slices(
            own.flatten(0, 1), head, ids.flatten(), slice_tokens(self.model.config.vocab_size),
            teacher=(dense.flatten(0, 1), head), weight=1.0)
