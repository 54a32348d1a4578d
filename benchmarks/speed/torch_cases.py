"""Measurements in PyTorch: scoring, slicing and repair on the device; prefill and decode.

Every time is taken between two synchronisations of the device. Models of one case are both in
memory and take turns.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bipdeploy.measuring.graphs import rewind
from bipdeploy.measuring.timing import Spread, interleaved, speedup
from bipdeploy.model.activations import Batches, Keep
from bipdeploy.model.blocks import Block, BlockWalker
from bipdeploy.model.families import architecture
from bipdeploy.pruning.kept import BlockScores, Kept, keep
from bipdeploy.pruning.slicing import slice_block
from bipdeploy.recipe.score import ScoreSection
from bipdeploy.running.machine import PeakMemory
from bipdeploy.stages.recover import refit_block
from bipdeploy.stages.score import score_together
from speed.cases import Case, Sizes
from speed.decoding import WARMUP_STEPS, Decoder, cudagraph_skips, static_cache
from speed.models import random_model

RIDGE = 0.01


class Walker(BlockWalker):
    """Walks a model that is in memory, where the pipeline reads blocks from a checkpoint."""

    def __init__(self, model: Any):
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.devices = [self.device]  # the model is on one
        self.model, self.config, self._torch = model, model.config, torch
        self.architecture = architecture(model.config.to_dict())
        self.family = self.architecture.family

    def embed(self, batches: list[torch.Tensor], keep: Keep = list, *,
              shared: bool = False) -> Batches:
        return keep(self.model.model.embed_tokens(windows) for windows in batches)

    def block(self, index: int, tokens: int) -> Block:
        layer = self.model.model.layers[index]
        return Block(layer, self._forward_arguments(layer, tokens))

    def blocks(self, tokens: int) -> Iterator[Block]:
        return (self.block(index, tokens) for index in range(len(self)))


class Torch:
    """Measures cases on one device. Keeps the models of the last case for the next."""

    def __init__(self, device: torch.device, sizes: Sizes, *, eager: bool):
        self.device, self.sizes, self.eager = device, sizes, eager
        self.dtype: torch.dtype = getattr(torch, sizes.dtype)
        self._models: dict[tuple[str, int], Any] = {}

    def hold(self, case: Case | None) -> None:
        """Let go of every model that a case does not need, and of all cached memory."""
        wanted = {(case.shape, 0), (case.shape, case.removed)} if case else set()
        self._models = {key: model for key, model in self._models.items() if key in wanted}
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def kept_bytes(self, case: Case) -> int:
        """Bytes of the models that a case finds in memory."""
        return sum(p.numel() * p.element_size() for key, model in self._models.items()
                   if key in {(case.shape, 0), (case.shape, case.removed)}
                   for p in model.parameters())

    def model(self, case: Case, removed: int) -> Any:
        key = (case.shape, removed)
        if key not in self._models:
            self._models[key] = random_model(case.config(removed, self.sizes), self.dtype,
                                             self.device)
        return self._models[key]

    @torch.no_grad()
    def measure(self, case: Case) -> dict[str, Any]:
        """The figures of a case, by its kind."""
        return getattr(self, case.kind)(case)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, name: str, run: Callable[[], Any]) -> dict[str, float]:
        began = self.now()
        run()
        return {name: self.now() - began}

    def peak(self, run: Callable[[], Any]) -> int:
        """Peak bytes of the device's memory while it runs; on a CPU, of the whole process."""
        if self.device.type == "cuda":
            self.now()
            torch.cuda.reset_peak_memory_stats()
            run()
            return torch.cuda.max_memory_allocated()
        memory = PeakMemory()
        run()
        return memory.bytes()

    def windows(self, case: Case) -> list[torch.Tensor]:
        sizes = self.sizes
        drawn = self._ids(case, sizes.windows, sizes.tokens)
        return list(drawn.split(sizes.batch))

    def _ids(self, case: Case, rows: int, columns: int) -> torch.Tensor:
        vocabulary = case.sizes_of(self.sizes)[0].vocabulary
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocabulary, (rows, columns), generator=generator).to(self.device)

    def score(self, case: Case) -> dict[str, Any]:
        """Scoring by LLM-BIP's bound beside forward passes of the same windows, after loading."""
        model, windows = self.model(case, 0), self.windows(case)
        walker = Walker(model)

        def forward() -> None:
            for batch in windows:
                model.model(batch, use_cache=False)

        runs = {"score": lambda: score_together(walker, windows, [ScoreSection()], 0),
                "forward": forward}
        times = interleaved({name: partial(self.timed, "seconds", run)
                             for name, run in runs.items()}, self.sizes.rounds, 1)
        seconds = {name: found["seconds"] for name, found in times.items()}
        return {"seconds": _spreads(seconds),
                "score_over_forward": speedup(seconds["score"], seconds["forward"]).as_dict(),
                "peak_bytes": {name: self.peak(run) for name, run in runs.items()},
                "weights_bytes": self.kept_bytes(case)}

    def slice(self, case: Case) -> dict[str, Any]:
        """Slicing all blocks where they are."""
        model = self.model(case, 0)
        run = partial(sliced, model, _kept(case, self.sizes))
        times = interleaved({"slice": partial(self.timed, "seconds", run)}, self.sizes.rounds, 1)
        return {"seconds": _spreads({"slice": times["slice"]["seconds"]}),
                "peak_bytes": {"slice": self.peak(run)}}

    def refit(self, case: Case) -> dict[str, Any]:
        """The closed-form repair of all blocks, in sequence, both models in memory."""
        dense, pruned = self.model(case, 0), self.model(case, case.removed)
        windows, kept = self.windows(case), _kept(case, self.sizes)
        tokens = self.sizes.tokens

        def cut() -> None:
            for layer, tensors in zip(pruned.model.layers, sliced(dense, kept), strict=True):
                layer.load_state_dict(tensors)

        def run() -> None:
            whole, own = Walker(dense), Walker(pruned)
            x_dense, x_own = whole.embed(windows), own.embed(windows)
            for index in range(len(whole)):
                x_dense, x_own, _ = refit_block(
                    partial(whole.block, index, tokens), own.block(index, tokens), x_dense, x_own,
                    RIDGE, self.dtype)

        def once() -> dict[str, float]:
            cut()
            return self.timed("seconds", run)

        times = interleaved({"refit": once}, self.sizes.slow_rounds, 1)
        cut()
        return {"seconds": _spreads({"refit": times["refit"]["seconds"]}),
                "peak_bytes": {"refit": self.peak(run)}}

    def prefill(self, case: Case) -> dict[str, Any]:
        """One forward pass over prompts into an empty static cache, logits of the last token."""
        ids = self._ids(case, case.batch, case.context)

        def prepared(removed: int) -> Callable[[], dict[str, float]]:
            model = self.model(case, removed)
            cache = static_cache(model, case.context)

            def once() -> dict[str, float]:
                rewind(cache, 0)
                return self.timed("seconds", lambda: model(
                    ids, past_key_values=cache, use_cache=True, logits_to_keep=1))

            return once

        return self._compared(case, prepared, "prefill", 2)

    def decode(self, case: Case) -> dict[str, Any]:
        """Greedy steps behind a context, through CUDA graphs unless eager; seconds of a step."""
        compiling: dict[str, float] = {}
        skips = cudagraph_skips()

        def prepared(removed: int) -> Callable[[], dict[str, float]]:
            decoder = Decoder(self.model(case, removed), case, self.sizes, self.eager)
            began = self.now()
            decoder.run(WARMUP_STEPS)
            compiling["pruned" if removed else "dense"] = self.now() - began

            def once() -> dict[str, float]:
                decoder.rewind()
                seconds = self.timed("seconds", lambda: decoder.run(self.sizes.new))["seconds"]
                return {"seconds": seconds / self.sizes.new}

            return once

        try:
            found = self._compared(case, prepared, "decode", 1)
            found["cuda_graphs_skipped"] = cudagraph_skips() - skips
        finally:
            if not self.eager:
                torch._dynamo.reset()  # frees the graphs with their memory
        for which in ("dense", "pruned"):
            found[f"{which}_tokens_per_second"] = case.batch / found["seconds"][which]["median"]
        how = "eager" if self.eager else "torch.compile, mode reduce-overhead"
        return {**found, "how": how, "first_steps_seconds": compiling}

    def _compared(self, case: Case, prepared: Callable[[int], Callable[[], dict[str, float]]],
                  phase: str, warmup: int) -> dict[str, Any]:
        runs = {"dense": prepared(0), "pruned": prepared(case.removed)}
        times = interleaved(runs, self.sizes.rounds, warmup)
        seconds = {which: found["seconds"] for which, found in times.items()}
        gain = speedup(seconds["dense"], seconds["pruned"])
        return {"seconds": _spreads(seconds), "speedup": gain.as_dict(),
                "ideal_speedup": case.ideal(self.sizes)[phase],
                "bytes_read" if phase == "decode" else "flops": dict(
                    zip(runs, case.costs(self.sizes)[phase], strict=True))}


def sliced(model: Any, kept: list[Kept]) -> list[dict[str, torch.Tensor]]:
    """The tensors of all blocks of a model, sliced on its device."""
    arch = architecture(model.config.to_dict())
    return [slice_block({name: p.data for name, p in layer.named_parameters()}, arch, index, own)
            for index, (layer, own) in enumerate(zip(model.model.layers, kept, strict=True))]


def _kept(case: Case, sizes: Sizes) -> list[Kept]:
    """Random groups at the pruned model's widths."""
    dense, pruned = case.sizes_of(sizes)
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> list[float]:
        return torch.rand(count, generator=generator).tolist()

    return [keep(BlockScores(drawn(whole.kv_heads), drawn(whole.intermediate)), widths)
            for whole, widths in zip(dense.blocks, pruned.blocks, strict=True)]


def _spreads(values: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {name: Spread.of(own).as_dict() for name, own in values.items()}
