"""The model card that goes with exported weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bipdeploy import artifacts, templates
from bipdeploy.checkpoint import Checkpoint
from bipdeploy.exporters.folder import is_per_block
from bipdeploy.exporters.portability import table
from bipdeploy.families import architecture
from bipdeploy.recipe import Recipe


def model_card(checkpoint: Checkpoint, recipe: Recipe | None,
               results: Mapping[str, Any] | None = None) -> str:
    """Markdown that says what the model is, how it was made (by `recipe`, where one is known) and
    how it is loaded. `results`: what `portability.verify` found, for a folder that vLLM serves.
    """
    arch = architecture(checkpoint.config)
    return templates.render(
        "card.md", recipe=recipe, per_block=is_per_block(checkpoint.config), blocks=arch.blocks,
        parameters=arch.parameters(), version=artifacts.version_of("bipdeploy"),
        results=table(results) if results else None)
