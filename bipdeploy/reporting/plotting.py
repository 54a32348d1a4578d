"""What plots of several results share: marks, colours, axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# Told apart by shape and by colour (Okabe and Ito's palette).
MARKS = ("o", "s", "D", "^", "v", "P", "X", "*")
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#0072B2", "#CC79A7", "#D55E00", "#F0E442", "#000000")


def log_axis(values: Sequence[float]) -> bool:
    """Whether perplexities are so far apart that only a logarithmic axis shows them."""
    return max(values) > 4 * min(values) and math.isfinite(max(values))


def logarithmic(panel: Any, axis: str = "x") -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(panel, f"set_{axis}scale")("log")
    own = getattr(panel, f"{axis}axis")
    own.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    own.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    own.set_minor_formatter(NullFormatter())
