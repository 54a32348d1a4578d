"""What a stage is given, and the artefacts that stages hand to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bipdeploy.planning.resolved import Resolved, resolved_at
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.running import artifacts
from bipdeploy.running.reporter import Reporter, Silent


@dataclass
class Job:
    """One run of one stage: read `inputs`, write into `out`, tell `reporter`.

    `inputs` holds the folder `dense` (a model), `pruned` (a model, as trained, repaired or
    sliced), `exported` (the model that is evaluated and timed), or earlier stages' folders by name.
    """

    recipe: Recipe
    inputs: dict[str, Path]
    out: Path
    reporter: Reporter = field(default_factory=Silent)
    resolved: Resolved | None = None

    @cached_property
    def dense(self) -> Resolved:
        """The recipe and the dense model's sizes: those of the run, or of a stage on plain paths
        those in the folder that it is given."""
        return self.resolved or resolved_at(self.recipe, self.inputs["dense"])

    def write_figures(self, figures: dict[str, float]) -> None:
        """Report figures, under the names in `bipdeploy.recipe.figures`."""
        artifacts.write_json(self.out / artifacts.FIGURES, figures)

    def write(self, name: str, data: Any) -> None:
        """Write a JSON artefact."""
        artifacts.write_json(self.out / name, data)
