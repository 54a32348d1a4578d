"""What training minimises. Pure.

Shapes: B windows, T tokens, V vocabulary, D hidden size, P predicted tokens (those that count).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from bipdeploy.tuning.data import IGNORED

Head = Callable[[torch.Tensor], torch.Tensor]  # hidden states [P, D] → logits [P, V]


def predicting(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Values [B, T, X] → [P, X]: those at tokens whose next one counts."""
    return values[:, :-1][labels[:, 1:] != IGNORED]


def predicted(labels: torch.Tensor) -> torch.Tensor:
    """Labels [B, T] → [P]: those that count, each predicted from the token before it."""
    return labels[:, 1:][labels[:, 1:] != IGNORED]


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(token) in nats. logits: [P, V]; targets: [P]."""
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


def divergence(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Sum over tokens of KL(teacher || student) in nats, at a temperature. Both: [P, V].

    Times the square of the temperature, so that gradients keep their size (Hinton et al. 2015).
    """
    return temperature ** 2 * functional.kl_div(
        functional.log_softmax(logits.float() / temperature, dim=-1),
        functional.log_softmax(teacher.float() / temperature, dim=-1),
        reduction="sum", log_target=True)


def mixed(logits: torch.Tensor, teacher: torch.Tensor | None, targets: torch.Tensor,
          weight: float, temperature: float) -> torch.Tensor:
    """(1 - weight) cross-entropy + weight KL, summed over tokens. Without a teacher `weight` must
    be 0."""
    loss = logits.new_zeros((), dtype=torch.float32)
    if weight < 1:
        loss = loss + (1 - weight) * cross_entropy(logits, targets)
    if weight > 0:
        assert teacher is not None
        loss = loss + weight * divergence(logits, teacher, temperature)
    return loss


def in_slices(states: torch.Tensor, head: Head, targets: torch.Tensor, size: int, *,
              teacher: tuple[torch.Tensor, Head] | None = None, weight: float = 0.0,
              temperature: float = 1.0) -> torch.Tensor:
    """`mixed` of the logits that `head` makes of states [P, D], `size` tokens at a time.

    `teacher`: the dense model's states [P, D] and head. No more than a slice's logits are in
    memory: where there are several, those of the backward pass are computed again.
    """
    def loss(own: torch.Tensor, dense: torch.Tensor | None, wanted: torch.Tensor) -> torch.Tensor:
        taught = None
        if teacher is not None and weight > 0:
            with torch.no_grad():
                taught = teacher[1](dense)  # type: ignore[arg-type]
        return mixed(head(own), taught, wanted, weight, temperature)

    total = states.new_zeros((), dtype=torch.float32)
    for start in range(0, len(targets), size):
        rows = slice(start, start + size)
        part = states[rows], teacher[0][rows] if teacher else None, targets[rows]
        total = total + (loss(*part) if len(targets) <= size else
                         checkpoint(loss, *part, use_reentrant=False))
    return total


def hidden_error(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor],
                 labels: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the mean over blocks of |student - teacher|² / |teacher|².

    student, teacher: a [B, T, D] for each block. As every token is measured by its own size, the
    few with massive activations do not drown the others.
    """
    total = labels.new_zeros((), dtype=torch.float32)
    for own, dense in zip(student, teacher, strict=True):
        wanted = predicting(dense, labels).float()
        error = (predicting(own, labels).float() - wanted).square().sum(-1)
        total = total + (error / wanted.square().sum(-1).clamp(min=1e-12)).sum()
    return total / len(student)
