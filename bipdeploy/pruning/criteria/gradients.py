"""Gradients of the loss by the weights, one block at a time, from the last to the first.

The walk forwards has kept every block's inputs; here each block is loaded again, run on them with
a graph of its own, and passes on the gradient by its inputs. There is never a graph of more than
one block on one batch, nor weight gradients of more than one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import cross_entropy

from bipdeploy.model.activations import Batches
from bipdeploy.model.blocks import Block, BlockWalker

COUPLED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
           "self_attn.o_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
           "mlp.down_proj.weight")

Gradients = dict[str, torch.Tensor]


def blocks_backwards(walker: BlockWalker, windows: list[torch.Tensor],
                     inputs: list[Batches]) -> Iterator[tuple[int, Block, Gradients]]:
    """Every block from the last to the first: its index, itself, its weights' gradients (float32).

    windows: batches of tokens [B, T]. inputs: for each block its inputs by batch [B, T, D], then
    the last block's outputs; on any device, each list emptied once it was used. The loss is the
    mean cross-entropy of the next token over all windows.
    """
    head = walker.head()
    upstream = [_loss_gradient(head, ids.to(walker.device), y.to(walker.device))
                for ids, y in zip(windows, inputs.pop(), strict=True)]
    predicted = sum(ids[:, 1:].numel() for ids in windows)
    for index in reversed(range(len(walker))):
        block = walker.block(index, windows[0].shape[1])
        gradients: Gradients = {}
        batches = inputs.pop()
        for number, x in enumerate(batches):
            upstream[number] = _backwards(block, x.to(walker.device), upstream[number], gradients)
        yield index, block, {name: g / predicted for name, g in gradients.items()}


def _loss_gradient(head: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor,
                   y: torch.Tensor) -> torch.Tensor:
    """d loss / d y of a batch, the loss summed over tokens: a mean could vanish in 16 bits."""
    y = y.detach().requires_grad_()
    with torch.enable_grad():
        logits = head(y[:, :-1]).float().flatten(0, 1)
        loss = cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
    return torch.autograd.grad(loss, y)[0]


def _backwards(block: Block, x: torch.Tensor, upstream: torch.Tensor,
               gradients: Gradients) -> torch.Tensor:
    """Add a batch's gradients by a block's weights; returns that by its input [B, T, D]."""
    weights = {name: p for name, p in block.layer.named_parameters() if name in COUPLED}
    for parameter in block.layer.parameters():
        parameter.requires_grad_(False)
    for parameter in weights.values():
        parameter.requires_grad_()
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        y = block(x)
    found = torch.autograd.grad(y, [x, *weights.values()], upstream, allow_unused=True)
    for (name, weight), gradient in zip(weights.items(), found[1:], strict=True):
        total = gradients.setdefault(name, torch.zeros_like(weight, dtype=torch.float32))
        if gradient is not None:
            total += gradient
    return found[0]
