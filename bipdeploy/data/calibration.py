"""The windows that score and repair a model, and the record of where they came from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bipdeploy.data import sampling, text, windows
from bipdeploy.errors import InputError
from bipdeploy.recipe.recipe import Recipe

if TYPE_CHECKING:
    import torch


def calibration_split(recipe: Recipe) -> str:
    return recipe.calibration.split or "calibration"


def training_split(recipe: Recipe) -> str:
    return recipe.tune.split or "calibration"


def test_split(recipe: Recipe) -> str:
    return recipe.evaluate.perplexity.split or "test"


def calibration_batches(recipe: Recipe, model: Path,
                        max_positions: int) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Batches of windows [B, T] for a model's tokenizer, and their provenance.

    The same recipe gives the same windows in every stage. Of a text that is much larger than what
    is asked for only parts are tokenised (see `sampling.parts`).
    """
    section = recipe.calibration
    if section.tokens > max_positions:
        raise InputError(f"calibration.tokens: {section.tokens} is longer than the model's maximum "
                         f"of {max_positions}; lower it")
    source = text.read(section.data, calibration_split(recipe), section.field, "calibration")
    for part in sampling.parts(source, section.samples * section.tokens, recipe.seed,
                               section.tokens):
        ids = windows.token_ids(part, model)
        if len(ids) >= section.samples * section.tokens:
            break
    drawn = windows.draw(ids, section.samples, section.tokens, recipe.seed)
    provenance = {"data": source.name, "split": source.split, "text_sha256": source.sha256,
                  "tokenised": sampling.described(source, part),
                  "windows": list(drawn.shape), "seed": recipe.seed,
                  "windows_sha256": hashlib.sha256(drawn.numpy().tobytes()).hexdigest()}
    return list(drawn.split(section.batch)), provenance
