"""Comparing two things on a noisy machine: interleaved rounds, ratios per round, their spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        low, _, high = quantiles(values, n=4, method="inclusive")
        return Spread(median(values), low, high)

    def as_dict(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high}


def interleaved(runs: Mapping[str, Callable[[], dict[str, float]]], repeats: int, warmup: int,
                advance: Callable[[], None] = lambda: None) -> dict[str, dict[str, list[float]]]:
    """Run every entry once per round, in alternating order: {entry: {measure: [per round]}}.

    Neighbours in time share the machine's mood, so ratios within a round are trustworthy where
    bare times are not. Warm-up rounds are run and not kept.
    """
    kept: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    for number in range(warmup + repeats):
        order = list(runs)[::1 if number % 2 else -1]
        for name in order:
            for measure, value in runs[name]().items():
                if number >= warmup:
                    kept[name].setdefault(measure, []).append(value)
        advance()
    return kept


def speedup(dense: Sequence[float], pruned: Sequence[float]) -> Spread:
    """How many times faster the pruned model is, from times of the same rounds."""
    return Spread.of([d / p for d, p in zip(dense, pruned, strict=True)])
