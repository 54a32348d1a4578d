"""What is measured: cases, their names and order, and the memory that each needs. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from typing import Any

from bipdeploy.errors import InputError
from bipdeploy.model import cost
from bipdeploy.model.families import Architecture, architecture
from speed.shapes import config_of, pruned_of

GIB = 2**30
OVERHEAD = GIB  # of libraries' workspaces and fragments
# The order in which a shape's cases are of interest.
KINDS = ("score", "decode", "prefill", "refit", "slice", "onnx", "vllm")


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    dtype: of weights, cache and activations; round_to: FFN widths are multiples of it; windows of
    `tokens` tokens score and repair, `batch` of them at once; `new` tokens are decoded each round;
    `rounds` are kept of those that take turns; `slow_rounds` of what takes long (refit, vLLM).
    """

    dtype: str = "bfloat16"
    round_to: int = 128
    windows: int = 128
    tokens: int = 128
    batch: int = 16
    new: int = 64
    rounds: int = 10
    slow_rounds: int = 3

    @property
    def value(self) -> int:
        """Bytes of a value."""
        return 4 if self.dtype == "float32" else 2


@dataclass(frozen=True)
class Case:
    """One comparison of a dense model with the same at `removed` percent of its block parameters.

    batch: sequences at once; context: tokens of each before the first new one. Both are 0 where
    they play no part, and so is `removed` for scoring. vLLM is measured at several batches.
    """

    shape: str
    kind: str
    batch: int = 0
    context: int = 0
    removed: int = 0

    def __str__(self) -> str:
        parts = [self.shape, self.kind, self.batch and f"b{self.batch}",
                 self.context and f"c{self.context}", self.removed and f"{self.removed}%"]
        return "/".join(part for part in parts if part)

    def config(self, removed: int, sizes: Sizes) -> dict[str, Any]:
        return _config(self.shape, removed, sizes)

    def sizes_of(self, sizes: Sizes) -> tuple[Architecture, Architecture]:
        """Dense and pruned."""
        return (architecture(_config(self.shape, 0, sizes)),
                architecture(_config(self.shape, self.removed, sizes)))

    def costs(self, sizes: Sizes) -> dict[str, list[float]]:
        """Of dense and pruned: bytes that a decode step reads at least, FLOPs of a prefill."""
        reached = self.context + sizes.new // 2
        counts: dict[str, Callable[[Architecture], float]] = {
            "decode": lambda arch: cost.read_per_step(arch, sizes.value, self.batch, reached),
            "prefill": lambda arch: self.batch * cost.flops(arch, self.context).whole(arch.blocks)
            + cost.head_flops(arch, self.batch)}
        phases = {"decode": ("decode",), "prefill": ("prefill",), "onnx": ("prefill", "decode")}
        return {phase: [counts[phase](arch) for arch in self.sizes_of(sizes)]
                for phase in phases.get(self.kind, ())}

    def ideal(self, sizes: Sizes) -> dict[str, float]:
        """The speed-ups there would be if only bytes (decode) or FLOPs (prefill) took time."""
        return {phase: dense / pruned for phase, (dense, pruned) in self.costs(sizes).items()}

    def work(self, sizes: Sizes) -> float:
        """What its time grows with: bytes, FLOPs, or the dense model's parameters."""
        costs = self.costs(sizes)
        return costs[self.kind][0] if self.kind in costs else self.sizes_of(sizes)[0].parameters()

    def memory(self, sizes: Sizes) -> int:
        """Bytes of the device's memory that it takes, estimated from above."""
        dense, pruned = self.sizes_of(sizes)
        widest, value = dense.blocks[0], sizes.value
        weights = (dense.parameters() + pruned.parameters() * (self.removed > 0)) * value
        if self.kind in ("score", "refit"):
            states = sizes.windows * sizes.tokens * dense.hidden * value
            once = sizes.batch * sizes.tokens * (8 * widest.intermediate + 12 * dense.hidden) * 4
            if self.kind == "score":
                return weights + states + once + OVERHEAD
            # Sums in float64 with the factor that solves them, and the update of one projection.
            solved = 8 * (3 * widest.intermediate**2 + 3 * widest.intermediate * dense.hidden)
            return weights + 4 * states + once + solved + OVERHEAD
        if self.kind in ("slice", "vllm"):
            return weights + 2 * OVERHEAD
        room = self.context + sizes.new * (self.kind != "prefill")
        cache = sum(arch.kv_bytes_per_token(bytes_per_value=value) for arch in (dense, pruned))
        queries = widest.heads * dense.head_dim
        # Keys and values are repeated for the query heads that share them.
        repeated = 2 * self.batch * room * queries * value * (widest.group > 1)
        tokens = self.batch * (1 if self.kind == "decode" else self.context)
        activations = tokens * (4 * widest.intermediate + 8 * dense.hidden + 4 * queries) * value
        logits = self.batch * dense.vocabulary * 8
        return weights + self.batch * room * cache + repeated + activations + logits + OVERHEAD


@lru_cache(maxsize=64)
def _config(shape: str, removed: int, sizes: Sizes) -> dict[str, Any]:
    return pruned_of(config_of(shape, sizes.dtype), removed / 100, sizes.round_to)


@dataclass(frozen=True)
class Grid:
    """All cases of some shapes, the first shape's most telling ones first."""

    shapes: Sequence[str]
    kinds: Sequence[str] = KINDS
    batches: Sequence[int] = (1, 8, 64)
    contexts: Sequence[int] = (128, 2048)
    removed: Sequence[int] = (20, 30, 50)

    @cached_property
    def cases(self) -> list[Case]:
        found = [case for shape in self.shapes for kind in self.kinds
                 for case in self._of(shape, kind)]
        return sorted(found, key=self._standing)

    def _of(self, shape: str, kind: str) -> list[Case]:
        if kind == "score":
            return [Case(shape, kind)]
        if kind in ("slice", "refit"):
            return [Case(shape, kind, removed=removed) for removed in self.removed]
        batches = {"vllm": (0,), "onnx": self.batches[:1]}.get(kind, self.batches)
        return [Case(shape, kind, batch, context, removed) for batch in batches
                for context in self.contexts for removed in self.removed]

    def _standing(self, case: Case) -> tuple[int, ...]:
        """Cases of one sequence at 30 and 50% come first, then other engines, then the rest."""
        main = case.removed in (0, 30, 50) and (
            case.kind == "score" or (case.batch == 1 and (
                case.kind == "decode" or (case.kind == "prefill"
                                          and case.context == max(self.contexts)))))
        second = case.removed == 30 and (case.kind in ("slice", "refit", "onnx", "vllm"))
        return (0 if main else 1 if second else 2, self.shapes.index(case.shape),
                KINDS.index(case.kind), case.batch, -case.context,
                [0, 30, 50, 20].index(case.removed) if case.removed in (0, 20, 30, 50) else 9)


def chosen(cases: Sequence[Case], patterns: Sequence[str]) -> list[Case]:
    """The cases whose names match one of the patterns, in order; all where there is none.

    Raises InputError for a pattern that matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(str(case), pattern) for case in cases):
            raise InputError(f"--only {pattern}: no case has such a name; they look like "
                             f"{', '.join(map(str, cases[:3]))} (--dry-run lists all)")
    return [case for case in cases
            if not patterns or any(fnmatchcase(str(case), pattern) for pattern in patterns)]
