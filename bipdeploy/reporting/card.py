"""The model card that goes with exported weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.model.formats import is_per_block
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.reporting import templates
from bipdeploy.reporting.portability import table
from bipdeploy.running import machine


def model_card(checkpoint: Checkpoint, recipe: Recipe | None,
               results: Mapping[str, Any] | None = None) -> str:
    """Markdown that says what the model is, how it was made (by `recipe`, where one is known) and
    how it is loaded. `results`: what `portability.verify` found, for a folder that vLLM serves.
    """
    arch = checkpoint.architecture
    return templates.render(
        "card.md", recipe=recipe, per_block=is_per_block(checkpoint.config), blocks=arch.blocks,
        parameters=arch.parameters(), version=machine.version_of("bipdeploy"),
        results=table(results) if results else None)
