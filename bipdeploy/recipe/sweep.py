"""The recipe's section `sweep`: what whole runs vary, and how Ray Tune runs them.

Imports no torch and no Ray.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from bipdeploy.recipe.base import Section, Share
from bipdeploy.recipe.names import Criteria, Repairs, Spreads


class EngineSection(Section):
    """How trials are spread over processes. Changes no quality figure."""

    address: str | None = Field(
        None, description="A running Ray cluster, as HOST:PORT or `auto`; all of its nodes see "
        "--out at the same path. Default: Ray is started on this machine.")
    concurrent: PositiveInt = Field(1, description="Trials at once, at most.")
    cpus: PositiveInt | None = Field(
        None, description="Cores of each trial; its threads too, unless OMP_NUM_THREADS is set. "
        "Default: this machine's cores over `concurrent`.")
    gpus: Annotated[float, Field(ge=0)] | None = Field(
        None, description="GPUs of each trial, such as 0.5; 0 hides them from it. Default: 1 where "
        "the cluster has any and model.device is not cpu.")


class SweepSection(Section):
    """What `bipdeploy sweep` varies: every combination is one run. Empty lists leave the recipe's
    own value."""

    ratios: list[Share] = Field(
        [], description="Values of prune.ratio; each takes the place of prune.target.")
    criteria: Criteria = Field(
        [], description="Criteria as in compare.criteria, such as `flap` or `llm_bip:measured`.")
    layers: Spreads = Field(
        [], description="Layers as in compare.layers; each replaces prune.depth too.")
    repairs: Repairs = Field(
        [], description="Repairs as in compare.repairs; without training, where they name none.")
    fields: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        {}, description="Any other fields: section.field → values, such as `recover.refit.ridge: "
        "[0.01, 0.1]`.")
    samples: PositiveInt | None = Field(
        None, description="Run this many of the combinations, drawn at random by `seed`; more "
        "samples keep the earlier ones. Default: all of them, a grid.")
    max_perplexity_ratio: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Trials whose perplexity.ratio is above this are stopped: by the rough "
        "figure before export and evaluate, by the exact one before bench. Default: none are.")
    stop: Literal["median", "never"] = Field(
        "median", description="`median`: of trials that differ in neither the budget nor the shape "
        "(prune, hardware, model, export and bench are the same), from the fourth on, those whose "
        "rough perplexity is above the others' median are stopped before export and evaluate "
        "(Ray's MedianStoppingRule).")
    rough_windows: PositiveInt = Field(
        16, description="Windows of the test text, the first ones, that rough perplexities are "
        "measured on.")
    engine: EngineSection = Field(default_factory=EngineSection)
