"""Stage `evaluate`: the exported model beside the dense one, on text that neither was scored on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from bipdeploy.data import text, windows
from bipdeploy.data.calibration import (
    calibration_split,
    calibration_texts,
    test_split,
    training_split,
)
from bipdeploy.errors import InputError
from bipdeploy.measuring import zero_shot
from bipdeploy.measuring.perplexity import Forward, Perplexity, forward_of, perplexity
from bipdeploy.model import loading
from bipdeploy.model.blocks import compute_device, compute_dtype
from bipdeploy.ort.folder import onnx_folders
from bipdeploy.planning.job import Job
from bipdeploy.planning.resolved import Resolved
from bipdeploy.recipe.base import TextSection
from bipdeploy.recipe.evaluate import text_field
from bipdeploy.recipe.figures import VERSUS_TORCH, compared, text_suffix
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.recipe.tune import TuneSection
from bipdeploy.tuning.data import ALPACA_COLUMNS

OVERLAP_LIMIT = 0.01  # share of 13-grams; a few stock phrases recur in any two texts
Measured = Mapping[str, Mapping[Any, Perplexity]]  # by text and window


def run(job: Job) -> None:
    """Write `evaluate.json` and the figures of perplexity and accuracy."""
    section = job.recipe.evaluate
    figures: dict[str, float] = {}
    record: dict[str, Any] = {"not_run": "evaluate.perplexity.enabled is false"}
    if section.perplexity.enabled:
        figures, record = measure_perplexity(job)
    record["zero_shot"] = {"not_run": "evaluate.zero_shot.enabled is false"}
    if section.zero_shot.enabled:
        accuracy, record["zero_shot"] = zero_shot.measure(job)
        figures |= accuracy
    if not figures:
        job.reporter.total(1)
    job.write("evaluate.json", record)
    job.write_figures(figures)


class Tested(NamedTuple):
    """A text that is measured on: how much of it the recipe's other texts hold, and its tokens."""

    source: text.Text
    overlap: dict[str, float]
    tokens: windows.Leading


def measure_perplexity(job: Job) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures and protocol of dense and pruned perplexity on the same windows."""
    recipe, section = job.recipe, job.recipe.evaluate.perplexity
    folders = {"dense": job.inputs["dense"], "pruned": job.inputs["exported"]}
    lengths = {w: window_tokens(w, job.dense.architecture.max_positions) for w in section.windows}
    texts = {name: _tested(job, name) for name in section.every}
    device = compute_device(recipe.model)
    dtype = compute_dtype(recipe.model, job.dense.config, device)
    onnx = onnx_folders(job.inputs.get("export"))
    steps = sum(len(own.tokens.ids) // n for own in texts.values() for n in lengths.values())
    job.reporter.total((2 + len(onnx)) * steps, "windows")

    def measured(forward: Forward) -> Measured:
        return {name: {w: perplexity(forward, own.tokens.ids, n, section.batch,
                                     job.reporter.advance, field=text_field(name))
                       for w, n in lengths.items()} for name, own in texts.items()}

    results = {}
    for which, folder in folders.items():
        model = loading.load_model(folder, dtype, device,
                                   trust_remote_code=recipe.model.trust_remote_code)
        results[which] = measured(forward_of(model))
        del model
    per_byte = {name: own.tokens.tokens_per_byte for name, own in texts.items()}
    figures = _figures("", results["dense"], results["pruned"], per_byte)
    for prefix, folder in onnx.items():
        from bipdeploy.ort.runtime import OnnxModel
        from bipdeploy.ort.session import device_of

        found = measured(OnnxModel(folder, device_of(recipe).type).logits)
        figures |= _figures(f"{prefix}.", results["dense"], found, per_byte,
                            torch=results["pruned"])
    described = {name: {
        "data": own.source.name, "split": own.source.split, "text_sha256": own.source.sha256,
        "overlap": own.overlap, "tokens_per_byte": own.tokens.tokens_per_byte,
        "tokenised": "all of the text" if own.tokens.whole else "its beginning",
        "windows": {str(w): {"tokens": n, "predicted": results["dense"][name][w].tokens}
                    for w, n in lengths.items()}} for name, own in texts.items()}
    return figures, {
        "protocol": "non-overlapping windows; the first token of each is context only; "
        "token-level", "dtype": str(dtype), "device": str(device), **described.pop(""),
        "texts": described}


def rehearse(resolved: Resolved) -> None:
    """Refuse, before the stages that come first, test texts that cannot be read or, where they
    hold conversations, be written by the model's chat template."""
    section = resolved.recipe.evaluate.perplexity
    for name, own in section.every.items() if section.enabled else ():
        source = _read(name, own)
        if source.conversations:
            windows.leading(source, resolved.dense, section.max_tokens)


def _read(name: str, section: TextSection) -> text.Text:
    return text.read(section.data, test_split(section), section.field, text_field(name))


def _tested(job: Job, name: str) -> Tested:
    """A text by name, read and tokenised; what of it was seen before is noted."""
    section = job.recipe.evaluate.perplexity
    source = _read(name, section.every[name])
    overlap = check_overlap(job.recipe, source)
    for used, share in overlap.items():
        if share > OVERLAP_LIMIT:
            job.reporter.note(f"{share:.1%} of the test text{name and f' {name!r}'} also stands in "
                              f"the text of {used}: the pruned model's perplexity is too good; use "
                              "another text or split")
    return Tested(source, overlap,
                  windows.leading(source, job.inputs["dense"], section.max_tokens))


def _figures(prefix: str, dense: Measured, pruned: Measured, tokens_per_byte: Mapping[str, float],
             torch: Measured | None = None) -> dict[str, float]:
    """Figures of one artefact beside the dense model; `torch`: the same weights in PyTorch."""
    figures: dict[str, float] = {}
    for name, found in dense.items():
        figures |= _figures_on(prefix, text_suffix(name), found, pruned[name],
                               tokens_per_byte[name], torch[name] if torch else None)
    return figures


def _figures_on(prefix: str, text_name: str, dense: Mapping[Any, Perplexity],
                pruned: Mapping[Any, Perplexity], tokens_per_byte: float,
                torch: Mapping[Any, Perplexity] | None) -> dict[str, float]:
    """The same on one text."""
    figures: dict[str, float] = {}
    for number, window in enumerate(dense):
        bases = [""] if number == 0 else []
        for suffix in (*bases, f".{window}"):
            for base, value in (("perplexity", lambda p: p.perplexity),
                                ("bits_per_byte", lambda p: p.bits_per_byte(tokens_per_byte))):
                name = f"{prefix}{base}{text_name}{suffix}"
                figures |= compared(name, value(dense[window]), value(pruned[window]))
                if torch is not None:
                    figures[f"{name}.{VERSUS_TORCH}"] = (value(pruned[window])
                                                         / value(torch[window]))
    return figures


def window_tokens(window: int | str, max_positions: int) -> int:
    """A recipe's window in tokens; `max` is the model's maximum, at most 2048."""
    if isinstance(window, str):
        return min(2048, max_positions)
    if window > max_positions:
        raise InputError(f"evaluate.perplexity.windows: {window} is longer than the model's "
                         f"maximum of {max_positions}; lower it or write max")
    return window


def check_overlap(recipe: Recipe, test: text.Text) -> dict[str, float]:
    """Share of the test text that the recipe's other texts also hold: `calibration`, all of its
    sources together, and `tune` where the model is trained."""
    sources = recipe.calibration.sources.values()
    same = any((own.source, calibration_split(own)) == (test.name, test.split) for own in sources)
    found = {"calibration": 1.0 if same else windows.overlap(calibration_texts(recipe), test)}
    if recipe.tune.enabled:
        found["tune"] = _held_by_training(recipe.tune, training_split(recipe), test)
    return found


def _held_by_training(section: TuneSection, split: str, test: text.Text) -> float:
    if (section.data, split) == (test.name, test.split):
        return 1.0
    if section.format == "alpaca":
        rows = text.records(section.data, split, ALPACA_COLUMNS, "tune").rows
        other = text.Text(section.data, split, tuple(" ".join(row.values()) for row in rows))
    else:
        other = text.read(section.data, split, section.field, "tune")
    return windows.overlap([other], test)
