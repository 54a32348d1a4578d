"""What a comparison found: means and spreads over seeds, as data and as tables. No torch here."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from bipdeploy.recipe.names import REPAIRS_COMPARED
from bipdeploy.reporting.markdown import as_markdown

Records = Sequence[Mapping[str, Any]]


def summarise(records: Records, dense: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry per text, window, method, ratio and repair, in the order of the records.

    perplexity: mean over seeds; spread: the largest distance from it. log_loss: the mean of
    ln(perplexity / dense). repaired: the share of it that the repair takes away, on the seeds that
    both have; cut: by method, the share of that method's log_loss (same ratio and repair) that
    this one spares.
    """
    found = []
    for text, window in ((t, w) for t, own in dense["perplexity"].items() for w in own):
        base = dense["perplexity"][text][window]["nats"]
        losses: dict[tuple[str, float, str], dict[int, float]] = {}
        values: dict[tuple[str, float, str], list[Mapping[str, Any]]] = {}
        for record in records:
            at = (record["method"], record["ratio"], record["repair"])
            losses.setdefault(at, {})[record["seed"]] = (
                record["perplexity"][text][window]["nats"] - base)
            values.setdefault(at, []).append(record)
        for at, own in values.items():
            method, ratio, repair = at
            perplexities = [r["perplexity"][text][window]["perplexity"] for r in own]
            mean = fmean(perplexities)
            entry = {
                "text": text, "window": window, "method": method, "ratio": ratio, "repair": repair,
                "seeds": sorted(losses[at]), "perplexity": mean,
                "spread": max(abs(p - mean) for p in perplexities),
                "log_loss": fmean(losses[at].values()),
                "removed": fmean(r["removed"] for r in own)}
            if repair != "none":
                entry["repaired"] = _spared(losses[at], losses.get((method, ratio, "none"), {}))
            entry["cut"] = {
                other: cut for other, its_ratio, its_repair in losses
                if (its_ratio, its_repair) == (ratio, repair) and other != method
                and (cut := _spared(losses[at], losses[other, ratio, repair])) is not None}
            accuracies = [r["accuracy"]["figures"]["accuracy.pruned"] for r in own
                          if "accuracy" in r]
            if accuracies:
                entry["accuracy"] = fmean(accuracies)
                entry["accuracy_spread"] = max(abs(a - entry["accuracy"]) for a in accuracies)
            found.append(entry)
    return found


def _spared(own: Mapping[int, float], other: Mapping[int, float]) -> float | None:
    """The share of one log loss that another spares, over the seeds that both have."""
    common = sorted(set(own) & set(other))
    whole = fmean(other[seed] for seed in common) if common else 0.0
    return 1 - fmean(own[seed] for seed in common) / whole if whole > 0 else None


def main(summary: Records) -> Records:
    """The entries of the first text and window: those of the table and the plot."""
    return [s for s in summary if (s["text"], s["window"]) == (
        summary[0]["text"], summary[0]["window"])]


def shown(value: float) -> str:
    """A perplexity with about four digits."""
    for limit, digits in ((100, 2), (1000, 1), (1e6, 0)):
        if value < limit:
            return f"{value:.{digits}f}"
    return f"{value:.1e}"


def with_spread(mean: float, spread: float) -> str:
    return f"{shown(mean)} ± {shown(spread)}"


def repairs_in(summary: Records) -> list[str]:
    """The repairs that were measured, in the order of their table."""
    present = {s["repair"] for s in summary}
    return [name for name in REPAIRS_COMPARED if name in present]


def table(summary: Records, ratios: Sequence[float]) -> list[list[str]]:
    """Rows of text: a heading, then methods; columns are ratios × repairs. A single seed has no
    spread."""
    columns = [(ratio, repair) for ratio in ratios for repair in repairs_in(
        [s for s in summary if s["ratio"] == ratio])]
    cells = {(s["method"], s["ratio"], s["repair"]):
             with_spread(s["perplexity"], s["spread"]) if len(s["seeds"]) > 1
             else shown(s["perplexity"]) for s in summary}
    rows = [["method", *(f"{ratio:.0%}, {repair}" for ratio, repair in columns)]]
    for method in dict.fromkeys(s["method"] for s in summary):
        row = [cells.get((method, *column), "–") for column in columns]
        if any(cell != "–" for cell in row):
            rows.append([method, *row])
    return rows


def ratios_in(summary: Records) -> list[float]:
    return sorted({s["ratio"] for s in summary})


def markdown(data: Mapping[str, Any]) -> str:
    """The page `compare.md`."""
    parts = [f"# {data['model']}: methods compared\n", protocol(data)]
    for text, window in dict.fromkeys((s["text"], s["window"]) for s in data["summary"]):
        own = [s for s in data["summary"] if (s["text"], s["window"]) == (text, window)]
        dense = data["dense"]["perplexity"][text][window]["perplexity"]
        parts += [f"\n## Perplexity, {text}, window {window} (dense {shown(dense)})\n",
                  as_markdown(table(own, ratios_in(own)))]
    accuracies = [s for s in main(data["summary"]) if "accuracy" in s] if data["summary"] else []
    if accuracies:
        rows = [{**s, "perplexity": 100 * s["accuracy"], "spread": 100 * s["accuracy_spread"]}
                for s in accuracies]
        parts += ["\n## Accuracy, mean over tasks, %\n", as_markdown(table(rows, ratios_in(rows)))]
    most = max((len(s["seeds"]) for s in data["summary"]), default=0)
    fewer = dict.fromkeys(s["method"] for s in data["summary"] if len(s["seeds"]) < most)
    if fewer:
        parts.append(f"\nSome cells of these have fewer than {most} seeds: {', '.join(fewer)}.")
    if data["not_run"]:
        parts += ["\n## Not run\n", *(f"- {about['cell']}: {about['why']}"
                                      for about in data["not_run"])]
    return "\n".join(parts) + "\n"


def protocol(data: Mapping[str, Any]) -> str:
    """How the figures were made, in a few sentences."""
    calibration = data["recipe"]["calibration"]
    return (f"Mean over seeds ± the largest distance from it. Every method has the same budget, "
            f"calibration windows (per seed: {calibration['samples']} of {calibration['tokens']} "
            f"tokens of {_texts(calibration['data'])}) and test windows. Made by\n\n"
            f"    {data['command']}\n")


def _texts(data: str | Sequence[Mapping[str, Any]]) -> str:
    """The recipe's `calibration.data` in words."""
    return data if isinstance(data, str) else " and ".join(
        f"{own['source']} ({own['share']:.0%})" for own in data)


def as_csv(summary: Records) -> str:
    """One line per entry of the summary."""
    fields = ("text", "window", "method", "ratio", "repair", "seeds", "perplexity", "spread",
              "log_loss", "repaired", "removed", "accuracy", "accuracy_spread")
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**s, "seeds": " ".join(map(str, s["seeds"]))} for s in summary)
    return buffer.getvalue()
