"""What training minimises. Pure. Shapes: B windows, T tokens, V vocabulary, P predicted tokens."""

from __future__ import annotations

import torch
from torch.nn import functional

from bipdeploy.tuning.data import IGNORED


def predicted(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, T, V] and labels [B, T] → those of the tokens that count: [P, V] in float32 and
    [P]. The logits at a token are about the next one."""
    counts = labels[:, 1:] != IGNORED
    return logits[:, :-1][counts].float(), labels[:, 1:][counts]


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over all tokens that count of -log p(token), in nats."""
    return functional.cross_entropy(*predicted(logits, labels), reduction="sum")


def divergence(logits: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor,
               temperature: float) -> torch.Tensor:
    """Sum over all tokens that count of KL(teacher || student) in nats, at a temperature.

    Times the square of the temperature, so that gradients keep their size (Hinton et al. 2015).
    """
    student, _ = predicted(logits, labels)
    target, _ = predicted(teacher, labels)
    return temperature ** 2 * functional.kl_div(
        functional.log_softmax(student / temperature, dim=-1),
        functional.log_softmax(target / temperature, dim=-1), reduction="sum", log_target=True)


def mixed(logits: torch.Tensor, teacher: torch.Tensor | None, labels: torch.Tensor,
          weight: float, temperature: float) -> torch.Tensor:
    """(1 - weight) cross-entropy + weight KL, summed over the tokens that count."""
    loss = (1 - weight) * cross_entropy(logits, labels) if weight < 1 else logits.new_zeros(())
    if teacher is not None and weight > 0:
        loss = loss + weight * divergence(logits, teacher, labels, temperature)
    return loss
