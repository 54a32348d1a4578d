"""A recipe and the sizes of its dense model as one object: read once, and handed on.

What it works out (the budget, the widths that meet it) is worked out when it is first asked for,
and raises InputError where it cannot be met.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bipdeploy.model import sources
from bipdeploy.model.checkpoint import Checkpoint, read_config
from bipdeploy.model.families import Architecture, BlockWidths, Width, architecture
from bipdeploy.model.formats import biased_config, pruned_config
from bipdeploy.planning import latency, targets
from bipdeploy.planning.targets import TARGETS, Target, Widths
from bipdeploy.pruning.allocation import part_widths, uniform_widths
from bipdeploy.pruning.choices import possible_widths
from bipdeploy.recipe.prune import PruneSection
from bipdeploy.recipe.recipe import Recipe

# Calibration tokens per input of the widest projection: fewer than these are noted, and as many as
# these are drawn where a recipe does not say. On the built-in model at 30% 1.3 end at perplexity
# 53 to 66 and 5.3 at 44, 10.7 at 39.2, 21 at 38.6, from 34 (docs/pages/method.md).
LITTLE, ENOUGH = 5, 12


@dataclass(frozen=True)
class Resolved:
    """`recipe`: with `calibration.samples` given. `config`: what the dense model's `config.json`
    says, and `architecture` the sizes in it.

    `folder`: the model's; None where the recipe's `model.shape` stands in for a file that cannot be
    had. `times`: the key of the measured times that the budget is about, None where it is about
    none; `table`: those times, None where this machine has not measured them.
    """

    recipe: Recipe
    config: Mapping[str, Any]
    folder: Path | None
    architecture: Architecture
    times: dict[str, Any] | None
    table: latency.Table | None

    @property
    def parallel(self) -> int:
        return self.recipe.hardware.tensor_parallel

    @property
    def scored(self) -> bool:
        """Whether widths depend on scores."""
        return self.recipe.prune.layers != "uniform" or self.recipe.prune.depth.any

    @property
    def dense(self) -> Path:
        """The model's folder, which is here once a run has begun."""
        assert self.folder is not None
        return self.folder

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The dense weights, opened once."""
        return Checkpoint(self.dense, self.config)

    @cached_property
    def target(self) -> Target | None:
        """The budget; None where it is a share of the parameters."""
        return targets.find(self.recipe, self.config, self.architecture, self.table)

    @cached_property
    def section(self) -> PruneSection:
        """`prune` with the ratio at which uniform widths meet the budget."""
        return targets.settled(self.architecture, self.recipe.prune, self.target,
                               tensor_parallel=self.parallel)

    @cached_property
    def uniform(self) -> tuple[BlockWidths, ...]:
        """The widths to expect where they depend on no scores."""
        return tuple(uniform_widths(self.architecture, self.section,
                                    tensor_parallel=self.parallel))

    @cached_property
    def allowed(self) -> Callable[[int, str], list[Width]]:
        """The widths that a part ("heads", "ffn") of a block may have."""
        return part_widths(self.architecture, self.section, tensor_parallel=self.parallel)

    @property
    def text(self) -> str:
        """How much text calibrates, in a few words."""
        calibration, widest = self.recipe.calibration, self.architecture.widest
        tokens = calibration.windows * calibration.tokens
        return (f"{calibration.windows} windows of {calibration.tokens} tokens, "
                f"{tokens / widest:.1f} for each of the {widest:,} inputs of the widest projection")

    @property
    def text_note(self) -> str | None:
        """That the calibration text is little for what is fitted to it; None where it is not."""
        calibration, widest = self.recipe.calibration, self.architecture.widest
        tokens = calibration.windows * calibration.tokens
        if self.recipe.recover.method != "refit" or tokens >= LITTLE * widest:
            return None
        wanted = -(-ENOUGH * widest // calibration.tokens)
        return (f"calibration: {tokens:,} tokens are {tokens / widest:.1f} for each of the "
                f"{widest:,} inputs of the widest projection, and a refit to fewer than {LITTLE} "
                f"fits noise; {ENOUGH} take {wanted} windows, and without calibration.samples and "
                "calibration.tokens_per_channel as many are drawn")

    @property
    def possible(self) -> tuple[BlockWidths, ...]:
        """Widths of single blocks that stand for all that scores may lead to."""
        return tuple(possible_widths(self.architecture, self.recipe.prune,
                                     tensor_parallel=self.parallel))

    def exported(self, widths: Widths) -> Architecture:
        """The sizes of what is exported: at these widths, and with the biases of its repair."""
        made = pruned_config(self.config, self.architecture, widths)
        if self.recipe.recover.method == "bias":
            made = biased_config(made, architecture(made))
        return architecture(made)

    def under(self, recipe: Recipe) -> Resolved:
        """The same under another recipe; read again where that names another model."""
        if recipe.model != self.recipe.model:
            return resolve(recipe)
        return self._keeping(_resolved(recipe, self.config, self.folder, self.architecture))

    def measured(self, table: latency.Table) -> Resolved:
        """The same with the times that the budget is about."""
        return self._keeping(replace(self, table=table))

    def _keeping(self, other: Resolved) -> Resolved:
        """Another of the same model, with the weights as they were opened."""
        if "checkpoint" in self.__dict__:
            other.__dict__["checkpoint"] = self.checkpoint
        return other


def resolve(recipe: Recipe) -> Resolved:
    """A recipe with its model's sizes, without the weights. Raises InputError where the config
    cannot be had, and the recipe states no shape, or it is of no known family."""
    return of_config(recipe, *sources.config_of(recipe.model))


def resolved_at(recipe: Recipe, folder: Path) -> Resolved:
    """As `resolve`, of the dense model in a folder that is here."""
    return of_config(recipe, read_config(folder), folder)


def of_config(recipe: Recipe, config: Mapping[str, Any], folder: Path | None = None) -> Resolved:
    """As `resolve`, of a model whose config is known."""
    return _resolved(recipe, config, folder, architecture(config))


def _resolved(recipe: Recipe, config: Mapping[str, Any], folder: Path | None,
              arch: Architecture) -> Resolved:
    recipe = _with_text(recipe, arch)
    asked = recipe.prune.target
    times = (latency.key(config, arch, recipe.model, asked.batch, asked.tokens,
                         recipe.prune.query_heads)
             if asked and "times" in TARGETS[asked.kind].needs else None)
    return Resolved(recipe, config, folder, arch, times, latency.lookup(times) if times else None)


def _with_text(recipe: Recipe, arch: Architecture) -> Recipe:
    """The recipe with a number of calibration windows, which otherwise follows from the model."""
    section = recipe.calibration
    if section.samples is not None:
        return recipe
    tokens = (section.tokens_per_channel or ENOUGH) * arch.widest
    # Some windows judge refits in a search, and some the ridge of those to the others.
    samples = max(3, len(section.sources), math.ceil(tokens / section.tokens))
    own = {"samples": samples, "tokens_per_channel": None}
    return recipe.model_copy(update={"calibration": section.model_copy(update=own)})
