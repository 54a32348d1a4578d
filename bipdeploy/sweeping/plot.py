"""The plot of a sweep: a panel per measure, a mark per finished trial, those on its front named."""

from __future__ import annotations

import io
from typing import Any

from bipdeploy.reporting.plotting import COLOURS, MARKS, log_axis, logarithmic
from bipdeploy.sweeping.results import QUALITY, Trials, front, measures


def draw(trials: Trials) -> bytes:
    """PNG of the finished trials."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    panels = measures(trials)
    figure = Figure(figsize=(1.0 + 5.4 * len(panels), 5.0), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for number, (panel, (name, short)) in enumerate(zip(axes, panels.items(), strict=True)):
        _panel(panel, [t for t in trials if name in t.get("figures", {})], name, number)
        panel.set(xlabel=f"{short}, " + ("times as fast as dense" if name.endswith(".speedup")
                                         else "pruned / dense"))
    axes[0].set_ylabel("perplexity, pruned / dense")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _panel(panel: Any, trials: Trials, figure: str, number: int) -> None:
    at = {t["name"]: (t["figures"][figure], t["figures"][QUALITY]) for t in trials}
    on = front(trials, figure)
    panel.scatter(*zip(*at.values(), strict=True), marker=MARKS[number], s=30,
                  facecolors="none", edgecolors="#555555")
    _quartiles(panel, trials, figure)
    panel.plot(*zip(*(at[name] for name in on), strict=True), marker=MARKS[number], markersize=6,
               color=COLOURS[3], linewidth=1, label="front")
    labels = {t["name"]: t["label"] for t in trials}
    middle = sum(panel.get_xlim()) / 2
    for name in on:
        left = at[name][0] <= middle  # names stay inside the panel
        panel.annotate(labels[name], at[name], textcoords="offset points",
                       xytext=(6 if left else -6, 5), ha="left" if left else "right", fontsize=8)
    if log_axis([y for _, y in at.values()]):
        logarithmic(panel, "y")
    panel.grid(color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)


def _quartiles(panel: Any, trials: Trials, figure: str) -> None:
    """Of timed figures the quartiles over rounds."""
    for t in trials:
        own = t.get("spread", {}).get(figure)
        if own:
            panel.hlines(t["figures"][QUALITY], own["low"], own["high"], color="#999999",
                         linewidth=1)
