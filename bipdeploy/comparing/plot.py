"""The plot of a comparison: a panel per ratio, methods from top to bottom, a mark per repair."""

from __future__ import annotations

import io
from typing import Any

from bipdeploy.comparing.results import Records, ratios_in, repairs_in
from bipdeploy.reporting.plotting import COLOURS, MARKS, log_axis, logarithmic


def draw(summary: Records, dense: float) -> bytes:
    """PNG of the entries of one text and window; `dense`: its perplexity of the dense model."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    ratios, repairs = ratios_in(summary), repairs_in(summary)
    methods = list(dict.fromkeys(s["method"] for s in summary))
    figure = Figure(figsize=(2.4 + 3.6 * len(ratios), 1.6 + 0.3 * len(methods)), dpi=120,
                    layout="constrained")
    panels = figure.subplots(1, len(ratios), squeeze=False, sharey=True)[0]
    for panel, ratio in zip(panels, ratios, strict=True):
        own = [s for s in summary if s["ratio"] == ratio]
        for number, repair in enumerate(repairs):
            _marks(panel, [s for s in own if s["repair"] == repair], methods, repair, number,
                   len(repairs))
        panel.axvline(dense, color="#555555", linestyle="--", linewidth=1, label="dense")
        if log_axis([dense, *(s["perplexity"] for s in own)]):
            logarithmic(panel)
        panel.set(title=f"{ratio:.0%} removed", xlabel="perplexity")
        panel.grid(axis="x", which="both", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].set_ylim(len(methods) - 0.4, -0.6)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center",
                  ncols=len(repairs) + 1, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _marks(panel: Any, entries: Records, methods: list[str], repair: str, number: int,
           repairs: int) -> None:
    """One repair's marks, a little above or below its method's line so that none hides another."""
    offset = 0.5 * ((number + 0.5) / repairs - 0.5)
    panel.errorbar([s["perplexity"] for s in entries],
                   [methods.index(s["method"]) + offset for s in entries],
                   xerr=[s["spread"] for s in entries], fmt=MARKS[number % len(MARKS)],
                   color=COLOURS[number % len(COLOURS)], markersize=5, capsize=2,
                   elinewidth=1, label=repair)
