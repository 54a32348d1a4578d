"""Choosing the next token of each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bipdeploy.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """temperature 0: the likeliest token. top_k 0 and top_p 1 leave all tokens to draw from."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; give 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; give more than 0 and at most 1")

    def choose(self, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The next tokens [rows] for logits [rows, vocabulary]."""
        if not self.temperature:
            return logits.argmax(-1)
        kept = self.top_k or logits.shape[-1]
        scores, tokens = logits.topk(min(kept, logits.shape[-1]))  # likeliest first
        odds = (scores / self.temperature).softmax(-1)
        # A token stays where those before it have less than top_p together; the first always.
        odds = odds.where(odds.cumsum(-1) - odds < self.top_p, 0)
        drawn = torch.multinomial(odds.cpu(), 1, generator=generator)
        return tokens.gather(-1, drawn.to(tokens.device))[:, 0]
