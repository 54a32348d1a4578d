"""The windows that score and repair a model, and the record of where they came from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bipdeploy.data import sampling, text, windows
from bipdeploy.errors import InputError
from bipdeploy.recipe.base import TextSection
from bipdeploy.recipe.calibration import SourceSection
from bipdeploy.recipe.recipe import Recipe

if TYPE_CHECKING:
    import torch


def calibration_split(source: SourceSection) -> str:
    return source.split or "calibration"


def training_split(recipe: Recipe) -> str:
    return recipe.tune.split or "calibration"


def test_split(section: TextSection) -> str:
    return section.split or "test"


def calibration_texts(recipe: Recipe) -> list[text.Text]:
    """The texts that calibrate, read."""
    return [_read(name, source) for name, source in recipe.calibration.sources.items()]


def fingerprints(recipe: Recipe) -> list[str]:
    """What changes when one of the texts does (see `text.fingerprint`)."""
    return [text.fingerprint(own.source, calibration_split(own))
            for own in recipe.calibration.sources.values()]


def calibration_batches(recipe: Recipe, model: Path,
                        max_positions: int) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Batches of windows [B, T] for a model's tokenizer, and their provenance; of a recipe that
    was resolved.

    The same recipe gives the same windows in every stage. Of a text that is much larger than what
    is asked for only parts are tokenised (see `sampling.parts`). Windows of several sources take
    turns, each source's in the order of its text.
    """
    import torch

    section = recipe.calibration
    if section.tokens > max_positions:
        raise InputError(f"calibration.tokens: {section.tokens} is longer than the model's maximum "
                         f"of {max_positions}; lower it")
    counts = sampling.apportioned(section.windows, [own.share for own in section.sources.values()])
    found = [_drawn(recipe, model, name, count)
             for name, count in zip(section.sources, counts, strict=True)]
    drawn = torch.stack([found[source][0][number]
                         for source, number in sampling.interleaved(counts)])
    origins = [origin for _, origin in found]
    if len(origins) > 1:
        for origin, own, count in zip(origins, section.sources.values(), counts, strict=True):
            origin |= {"share": own.share, "windows": count}
    provenance = {**(origins[0] if len(origins) == 1 else {"sources": origins}),
                  "windows": list(drawn.shape), "seed": recipe.seed,
                  "windows_sha256": _digest(drawn)}
    return list(drawn.split(section.batch)), provenance


def calibration_windows(recipe: Recipe, model: Path, tokens: int, wanted: int
                        ) -> tuple[torch.Tensor, dict[str, Any]]:
    """At most `wanted` windows [N, tokens] of the same texts, for what reads more of them than
    scoring does: as many as they hold where that is less, each text by its share."""
    import torch

    sources = recipe.calibration.sources
    counts = sampling.apportioned(max(wanted, len(sources)),
                                  [own.share for own in sources.values()])
    found, whole = [], 1.0  # the share of what is wanted that every text can give
    for name, count in zip(sources, counts, strict=True):
        source = _read(name, sources[name])
        for part in sampling.parts(source, count * tokens, recipe.seed, tokens):
            ids = windows.token_ids(part, model)
            if len(ids) >= count * tokens:
                break
        found.append((source, sampling.described(source, part), ids))
        whole = min(whole, len(ids) // tokens / count)
    counts = [int(count * whole) for count in counts]
    drawn = [windows.draw(ids, count, tokens, recipe.seed, source.name)
             for (source, _, ids), count in zip(found, counts, strict=True)]
    together = torch.stack([drawn[source][number]
                            for source, number in sampling.interleaved(counts)]) if any(
        counts) else torch.empty(0, tokens, dtype=torch.long)
    return together, {
        "sources": [{"data": source.name, "text_sha256": source.sha256, "tokenised": part,
                     "windows": count}
                    for (source, part, _), count in zip(found, counts, strict=True)],
        "windows": list(together.shape), "seed": recipe.seed, "windows_sha256": _digest(together)}


def _digest(drawn: torch.Tensor) -> str:
    return hashlib.sha256(drawn.numpy().tobytes()).hexdigest()


def _read(name: str, source: SourceSection) -> text.Text:
    section, _, key = name.rpartition(".")
    return text.read(source.source, calibration_split(source), source.field, section, key)


def _drawn(recipe: Recipe, model: Path, name: str,
           count: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """`count` windows [S, T] of a source, and where they come from."""
    section = recipe.calibration
    source = _read(name, section.sources[name])
    for part in sampling.parts(source, count * section.tokens, recipe.seed, section.tokens):
        ids = windows.token_ids(part, model)
        if len(ids) >= count * section.tokens:
            break
    alone = len(section.sources) == 1
    drawn = windows.draw(ids, count, section.tokens, recipe.seed,
                         "the text" if alone else source.name)
    return drawn, {"data": source.name, "split": source.split, "text_sha256": source.sha256,
                   "tokenised": sampling.described(source, part)}
