"""What a stage is given, and the artefacts that stages hand to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bipdeploy import artifacts
from bipdeploy.console import Reporter, Silent
from bipdeploy.recipe import Recipe


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

    def write_figures(self, figures: dict[str, float]) -> None:
        """Report figures, under the names in `bipdeploy.figures`."""
        artifacts.write_json(self.out / artifacts.FIGURES, figures)

    def write(self, name: str, data: Any) -> None:
        """Write a JSON artefact."""
        artifacts.write_json(self.out / name, data)
