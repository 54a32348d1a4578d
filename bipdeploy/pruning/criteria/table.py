"""The table of importance criteria: which groups of a block matter least.

A criterion is a pure function from a block's weights and its calibration statistics to a score
per KV group, per query head and per FFN channel; higher is kept. To add one, write the function in
a file here, add a row to the table and its name to `recipe/names.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bipdeploy.errors import InputError
from bipdeploy.table import Row, by_name


@dataclass(frozen=True)
class Criterion(Row):
    """A row of the table. The function takes a `BlockView` and returns `Scores`.

    `needs` names the statistics that the walk has to collect; with `gradients` there is a second
    walk, backwards. `comparable`: scores of different blocks are on one scale; where false, a
    global ranking standardises them within each block first. `one_scale`: those of heads and of
    channels are on one scale too. `counts`: the choice depends on how many stay, so that scores
    hold for one set of widths.
    """

    comparable: bool
    source: str
    one_scale: bool = False
    counts: bool = False

    def statistics(self, propagation: str) -> frozenset[str]:
        """What the walk collects under a propagation; measuring is LLM-BIP's own extra."""
        measures = propagation == "measured" and "gram" in self.needs
        return frozenset(self.needs) | ({"measured"} if measures else set())


def _counts(resolved: Any) -> None:
    recipe = resolved.recipe
    spread = recipe.prune.layers if recipe.prune.layers != "uniform" else "depth"
    if spread != "depth" or recipe.prune.depth.any:
        raise InputError(f"score.criterion: {recipe.score.criterion} chooses for widths that are "
                         f"known before it scores, and with {spread} they depend on scores; set "
                         "prune.layers to uniform without prune.depth, or take another criterion")


CRITERIA: dict[str, Criterion] = by_name(
    Criterion("llm_bip", ("energy", "gram", "ffn_parts", "output"), None,
              "bipdeploy.pruning.criteria.llm_bip:influence", True,
              "LLM-BIP, arXiv 2412.06419"),
    Criterion("llm_bip_joint", ("outer", "ffn_parts", "output"), None,
              "bipdeploy.pruning.criteria.joint:influence", True,
              "LLM-BIP, arXiv 2412.06419, selecting jointly as ZipLM does, "
              "arXiv 2302.04089"),
    Criterion("osscar", ("outer",), _counts,
              "bipdeploy.pruning.criteria.osscar:chosen", False,
              "OSSCAR, arXiv 2403.12983", counts=True),
    Criterion("wanda_sp", ("energy",), None,
              "bipdeploy.pruning.criteria.baselines:wanda_sp", False,
              "arXiv 2306.11695, in the structured form of arXiv 2312.11983"),
    Criterion("flap", ("moments",), None,
              "bipdeploy.pruning.criteria.flap:wifv", True,
              "FLAP (WIFV), arXiv 2312.11983", one_scale=True),
    Criterion("flap_ifv", ("moments",), None,
              "bipdeploy.pruning.criteria.flap:ifv", True,
              "FLAP (IFV), arXiv 2312.11983", one_scale=True),
    Criterion("flap_wifn", ("energy",), None,
              "bipdeploy.pruning.criteria.flap:wifn", True,
              "FLAP (WIFN), arXiv 2312.11983", one_scale=True),
    Criterion("taylor", ("gradients",), None,
              "bipdeploy.pruning.criteria.taylor:elements", True,
              "LLM-Pruner (element-wise), arXiv 2305.11627"),
    Criterion("taylor_vector", ("gradients",), None,
              "bipdeploy.pruning.criteria.taylor:vectors", True,
              "LLM-Pruner (vector-wise), arXiv 2305.11627"),
    Criterion("magnitude", (), None,
              "bipdeploy.pruning.criteria.baselines:magnitude", False,
              "L2 norm of the coupled weights"),
    Criterion("random", (), None,
              "bipdeploy.pruning.criteria.baselines:random", True, "uniform draws from the seed"),
)
