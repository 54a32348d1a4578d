"""Decoding in PyTorch with transformers' static cache, through CUDA graphs or eagerly."""

from __future__ import annotations

from typing import Any

import torch

from bipdeploy.measuring.graphs import rewind
from speed.cases import Case, Sizes

WARMUP_STEPS = 4  # compile, warm up and record a CUDA graph, replay it


class Decoder:
    """Decodes greedily behind a context of random keys and values, always at the same addresses.

    A CUDA graph reads and writes where it did when it was recorded: the cache's tensors are marked
    as static by transformers, the tokens are copied in and out.
    """

    def __init__(self, model: Any, case: Case, sizes: Sizes, eager: bool):
        self.model, self.context = model, case.context
        self.cache = static_cache(model, case.context + sizes.new)
        self.token = torch.zeros((case.batch, 1), dtype=torch.long, device=model.device)
        self.step(self.token)  # not compiled: the cache's tensors are made, and marked, outside
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        self.rewind()
        self.run_step = self.step if eager else torch.compile(
            self.step, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """The next token [B, 1] after one [B, 1]."""
        out = self.model(token, past_key_values=self.cache, use_cache=True)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def rewind(self) -> None:
        rewind(self.cache, self.context)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            # Copied before the next step: a graph's output is overwritten when it runs again.
            self.token.copy_(self.run_step(self.token))


def static_cache(model: Any, room: int) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=room)


def cudagraph_skips() -> int:
    """How often inductor has fallen back from CUDA graphs in this process."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["cudagraph_skips"]
