"""Importance criteria: which groups of a block matter least. The table is `CRITERIA`.

A criterion is a pure function from a block's weights and its calibration statistics to a score
per KV group and per FFN channel; higher is kept. To add one, write the function in a file here
and add a line to the table. This module imports no torch, so that a recipe can be checked fast.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bipdeploy.criteria.statistics import BlockView, Scores


@dataclass(frozen=True)
class Criterion:
    """A row of the table.

    `function` is "module:name" below bipdeploy.criteria. `needs` names the statistics that the
    walk has to collect; with `gradients` there is a second walk, backwards.
    `comparable`: scores of different blocks are on one scale; where false, a global ranking
    standardises them within each block first. `one_scale`: those of heads and of channels are on
    one scale too.
    """

    function: str
    needs: frozenset[str]
    comparable: bool
    source: str
    one_scale: bool = False

    def statistics(self, propagation: str) -> frozenset[str]:
        """What the walk collects under a propagation; measuring is LLM-BIP's own extra."""
        measures = propagation == "measured" and "gram" in self.needs
        return self.needs | {"measured"} if measures else self.needs

    def load(self) -> Callable[[BlockView], Scores]:
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(f"bipdeploy.criteria.{module}"), name)


CRITERIA: dict[str, Criterion] = {
    "llm_bip": Criterion("llm_bip:influence", frozenset({"energy", "gram", "ffn_parts", "output"}),
                         True, "LLM-BIP, arXiv 2412.06419"),
    "llm_bip_joint": Criterion("joint:influence", frozenset({"outer", "ffn_parts", "output"}),
                               True, "LLM-BIP, arXiv 2412.06419, selecting jointly as ZipLM does, "
                               "arXiv 2302.04089"),
    "wanda_sp": Criterion("baselines:wanda_sp", frozenset({"energy"}), False,
                          "arXiv 2306.11695, in the structured form of arXiv 2312.11983"),
    "flap": Criterion("flap:wifv", frozenset({"moments"}), True,
                      "FLAP (WIFV), arXiv 2312.11983", one_scale=True),
    "flap_ifv": Criterion("flap:ifv", frozenset({"moments"}), True,
                          "FLAP (IFV), arXiv 2312.11983", one_scale=True),
    "flap_wifn": Criterion("flap:wifn", frozenset({"energy"}), True,
                           "FLAP (WIFN), arXiv 2312.11983", one_scale=True),
    "taylor": Criterion("taylor:elements", frozenset({"gradients"}), True,
                        "LLM-Pruner (element-wise), arXiv 2305.11627"),
    "taylor_vector": Criterion("taylor:vectors", frozenset({"gradients"}), True,
                               "LLM-Pruner (vector-wise), arXiv 2305.11627"),
    "magnitude": Criterion("baselines:magnitude", frozenset(), False,
                           "L2 norm of the coupled weights"),
    "random": Criterion("baselines:random", frozenset(), True, "uniform draws from the seed"),
}

NAMES = tuple(CRITERIA)
