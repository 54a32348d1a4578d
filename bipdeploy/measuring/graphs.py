"""Decoding through a CUDA graph: what a step takes when Python does not have to launch its kernels.

Eager decoding of a small batch on a large GPU waits for launches, and then the pruned model seems
no faster than the dense one. Engines that serve models replay graphs, as this does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

WARMUP_STEPS = 3  # before recording: libraries choose kernels and allocate their workspaces


def recordable(model: Any, tokens: int) -> bool:
    """Whether a step can be recorded: what is done to a cache must not change on the way, as it
    does in a layer with a window where the text outgrows that."""
    from transformers import StaticCache

    cache: Any = StaticCache(config=model.config, max_cache_len=tokens)
    return all(layer.max_cache_len >= tokens for layer in cache.layers)


def rewind(cache: Any, length: int) -> None:
    """Make a static cache hold its first `length` tokens, in place: graphs know its tensors."""
    for layer in cache.layers:
        if layer.is_initialized:  # a removed attention keeps nothing
            layer.cumulative_length.fill_(length)
            if layer.is_sliding:
                layer.cumulative_length_int = length


class RecordedDecoder:
    """Greedy decoding behind a prompt, with the step recorded once and replayed.

    The cache is transformers' static one, of the prompt and `steps` tokens, so that every step
    reads and writes the same addresses; each reads the whole cache.
    """

    def __init__(self, model: Any, ids: torch.Tensor, steps: int):
        """`ids`: the prompt [B, T]. On a CPU, which records nothing, the step itself is run."""
        from transformers import StaticCache

        self._model, self._steps, self._prompt = model, steps, ids.shape[1]
        self._cache: Any = StaticCache(config=model.config, max_cache_len=ids.shape[1] + steps)
        with torch.inference_mode():
            out = model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._first = out.logits[:, -1].argmax(-1, keepdim=True)
            self._token = self._first.clone()
            self._replay = self._recorded() if ids.device.type == "cuda" else self._step

    def _recorded(self) -> Callable[[], None]:
        own = torch.cuda.Stream()
        own.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(own):
            for _ in range(min(WARMUP_STEPS, self._steps)):
                self._step()
        torch.cuda.current_stream().wait_stream(own)
        self._rewind()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph.replay

    def _step(self) -> None:
        out: Any = self._model(self._token, past_key_values=self._cache, use_cache=True)
        self._token.copy_(out.logits[:, -1].argmax(-1, keepdim=True))

    def _rewind(self) -> None:
        """Back to the end of the prompt."""
        rewind(self._cache, self._prompt)
        self._token.copy_(self._first)

    @torch.inference_mode()
    def tokens(self) -> list[list[int]]:
        """The tokens [B, steps] that follow the prompt's first one."""
        self._rewind()
        found = []
        for _ in range(self._steps):
            self._replay()
            found.append(self._token[:, 0].clone())
        return torch.stack(found, dim=1).tolist()

    @torch.inference_mode()
    def seconds(self) -> float:
        """Seconds of a step, the mean of all of one generation."""
        self._rewind()
        began = self._now()
        for _ in range(self._steps):
            self._replay()
        return (self._now() - began) / self._steps

    def _now(self) -> float:
        if self._token.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
