"""Perplexity on a few windows: what tells early whether a trial is worth going on with."""

from __future__ import annotations

from pathlib import Path

from bipdeploy.data import text, windows
from bipdeploy.data.calibration import test_split
from bipdeploy.measuring.perplexity import forward_of, perplexity
from bipdeploy.model import loading
from bipdeploy.model.blocks import compute_device, compute_dtype
from bipdeploy.planning.resolved import Resolved
from bipdeploy.running import artifacts
from bipdeploy.running.machine import release_memory
from bipdeploy.stages.evaluate import window_tokens
from bipdeploy.sweeping import sharing


def nats(resolved: Resolved, model: Path, count: int, key: str, kept: Path) -> float:
    """Nats per token of the folder `model`, on the first `count` windows that `evaluate` reads.

    The value is kept in the folder `kept` under `key`, a digest of what the model depends on.
    Raises StageError where it is not a number.
    """
    recipe, section = resolved.recipe, resolved.recipe.evaluate.perplexity
    name = artifacts.digest([key, count, recipe.model.model_dump(mode="json"),
                             section.model_dump(mode="json"),
                             text.fingerprint(section.data, test_split(section))])[:16]
    path = kept / f"{name}.json"
    with sharing.locked(kept / f"{name}.lock"):
        if not path.is_file():
            artifacts.write_json(path, {"nats": _measure(resolved, model, count)})
    return artifacts.read_json(path)["nats"]


def _measure(resolved: Resolved, model: Path, count: int) -> float:
    recipe, section, dense = resolved.recipe, resolved.recipe.evaluate.perplexity, resolved.dense
    length = window_tokens(section.windows[0], resolved.architecture.max_positions)
    source = text.read(section.data, test_split(section), section.field, "evaluate.perplexity")
    limit = min(count * length, section.max_tokens or count * length)
    ids = windows.leading(source, dense, limit).ids
    device = compute_device(recipe.model)
    loaded = loading.load_model(model, compute_dtype(recipe.model, resolved.config, device), device,
                                trust_remote_code=recipe.model.trust_remote_code)
    value = perplexity(forward_of(loaded), ids, length, section.batch).nats
    del loaded
    release_memory()
    return value
