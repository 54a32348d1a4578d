"""Perplexity on a few windows: what tells early whether a trial is worth going on with."""

from __future__ import annotations

import math
from pathlib import Path

from bipdeploy import artifacts
from bipdeploy.blocks import compute_device, compute_dtype, release_memory
from bipdeploy.calibration import test_split
from bipdeploy.checkpoint import read_config
from bipdeploy.data import text, windows
from bipdeploy.errors import StageError
from bipdeploy.evaluation.perplexity import forward_of, perplexity
from bipdeploy.families import architecture
from bipdeploy.modeling import loading
from bipdeploy.recipe import Recipe
from bipdeploy.stages.evaluate import window_tokens
from bipdeploy.sweeping import sharing


def nats(recipe: Recipe, dense: Path, model: Path, count: int, key: str, kept: Path) -> float:
    """Nats per token of the folder `model`, on the first `count` windows that `evaluate` reads.

    The value is kept in the folder `kept` under `key`, a digest of what the model depends on.
    Raises StageError where it is not a number.
    """
    section = recipe.evaluate.perplexity
    name = artifacts.digest([key, count, recipe.model.model_dump(mode="json"),
                             section.model_dump(mode="json"),
                             text.fingerprint(section.data, test_split(recipe))])[:16]
    path = kept / f"{name}.json"
    with sharing.locked(kept / f"{name}.lock"):
        if not path.is_file():
            artifacts.write_json(path, {"nats": _measure(recipe, dense, model, count)})
    return artifacts.read_json(path)["nats"]


def _measure(recipe: Recipe, dense: Path, model: Path, count: int) -> float:
    section = recipe.evaluate.perplexity
    config = read_config(dense)
    length = window_tokens(section.windows[0], architecture(config).max_positions)
    source = text.read(section.data, test_split(recipe), section.field)
    ids = windows.token_ids(source, dense)[:section.max_tokens][:count * length]
    device = compute_device(recipe.model)
    loaded = loading.load_model(model, compute_dtype(recipe.model, config, device), device,
                                trust_remote_code=recipe.model.trust_remote_code)
    value = perplexity(forward_of(loaded), ids, length, section.batch).nats
    del loaded
    release_memory()
    if math.isnan(value):
        raise StageError("the rough perplexity is not a number; set model.dtype to float32")
    return value
