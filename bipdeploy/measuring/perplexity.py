"""Perplexity over non-overlapping windows, as the pruning papers measure it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from bipdeploy.errors import InputError, StageError
from bipdeploy.recipe.tune import slice_tokens

if TYPE_CHECKING:
    import torch


IGNORED = -100  # a target that adds no loss


class Perplexity(NamedTuple):
    """nats: mean negative log-likelihood per predicted token; tokens: how many were predicted."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats) if self.nats < 700 else math.inf

    def bits_per_byte(self, tokens_per_byte: float) -> float:
        """Independent of the tokenizer: bits per token times tokens per byte of the text."""
        return self.nats / math.log(2) * tokens_per_byte


# Token ids [B, T] → logits [P, V] of consecutive tokens of all windows, one part after another, on
# any device. What is [B, T, V] is such parts too.
Forward = Callable[["torch.Tensor"], Iterable["torch.Tensor"]]


def perplexity(forward: Forward, ids: torch.Tensor, window: int, batch: int,
               advance: Callable[[int], None] = lambda _: None, *,
               field: str = "evaluate.perplexity") -> Perplexity:
    """Token-level perplexity of a causal model on a token sequence [tokens].

    The sequence is cut into non-overlapping windows; each is read on its own, and its first token
    is context only. The rest that fills no window is left out. Raises InputError where not even
    one window fits, naming the recipe's `field`, StageError where the logits are NaN.
    """
    import torch

    count = len(ids) // window
    if not count:
        raise InputError(f"{field}: the text has {len(ids)} tokens, which fills no "
                         f"window of {window}; give a longer text or a shorter window")
    total = 0.0
    with torch.inference_mode():
        for windows in ids[:count * window].view(count, window).split(batch):
            # The last position predicts nothing here; cutting it off would copy all logits.
            targets = torch.nn.functional.pad(windows[:, 1:], (0, 1), value=IGNORED).flatten()
            losses, at = [], 0
            for logits in forward(windows):
                own = targets[at:at + len(logits)].to(logits.device)
                losses.append(torch.nn.functional.cross_entropy(
                    logits.float(), own, ignore_index=IGNORED, reduction="sum"))
                at += len(logits)
            assert at == len(targets)
            total += float(torch.stack(losses).double().sum())
            advance(len(windows))
    if math.isnan(total):
        raise StageError("perplexity is not a number: the model's type overflows; set model.dtype "
                         "to float32 (export.onnx.dtype of a graph)")
    predicted = count * (window - 1)
    return Perplexity(total / predicted, predicted)


def forward_of(model: Any) -> Forward:
    """A transformers model as `perplexity` takes it. The logits of all tokens are never in memory
    together: with a vocabulary of 128,000 those of 8 windows of 2,048 take 8 GB in float32."""
    device = next(model.parameters()).device
    size = slice_tokens(model.config.vocab_size)

    def forward(ids: torch.Tensor) -> Iterator[torch.Tensor]:
        if type(model).__module__.startswith("transformers_modules"):
            # A checkpoint's own code: what it does between states and logits is not known.
            yield from model(ids.to(device), use_cache=False).logits
            return
        states = model.base_model(ids.to(device), use_cache=False).last_hidden_state
        yield from map(model.get_output_embeddings(), states.flatten(0, 1).split(size))

    return forward
