"""Stage `evaluate`: the exported model beside the dense one, on text that neither was scored on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bipdeploy.data import text, windows
from bipdeploy.data.calibration import calibration_split, test_split, training_split
from bipdeploy.errors import InputError
from bipdeploy.measuring import zero_shot
from bipdeploy.measuring.perplexity import Forward, Perplexity, forward_of, perplexity
from bipdeploy.model import loading
from bipdeploy.model.blocks import compute_device, compute_dtype
from bipdeploy.ort.folder import onnx_folders
from bipdeploy.planning.job import Job
from bipdeploy.planning.resolved import Resolved
from bipdeploy.recipe.base import TextSection
from bipdeploy.recipe.figures import VERSUS_TORCH, compared
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.recipe.tune import TuneSection
from bipdeploy.tuning.data import ALPACA_COLUMNS

OVERLAP_LIMIT = 0.01  # share of 13-grams; a few stock phrases recur in any two texts


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


def measure_perplexity(job: Job) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures and protocol of dense and pruned perplexity on the same windows."""
    recipe, section = job.recipe, job.recipe.evaluate.perplexity
    folders = {"dense": job.inputs["dense"], "pruned": job.inputs["exported"]}
    lengths = {w: window_tokens(w, job.dense.architecture.max_positions) for w in section.windows}
    source = _test_text(recipe)
    overlap = check_overlap(recipe, source)
    for used, share in overlap.items():
        if share > OVERLAP_LIMIT:
            job.reporter.note(f"{share:.1%} of the test text also stands in the text of {used}: "
                              "the pruned model's perplexity is too good; use another text or "
                              "split")
    ids, tokens_per_byte, whole = windows.leading(source, folders["dense"], section.max_tokens)
    device = compute_device(recipe.model)
    dtype = compute_dtype(recipe.model, job.dense.config, device)
    onnx = onnx_folders(job.inputs.get("export"))
    steps = sum(len(ids) // n for n in lengths.values())
    job.reporter.total((2 + len(onnx)) * steps, "windows")

    def measured(forward: Forward) -> dict[Any, Perplexity]:
        return {w: perplexity(forward, ids, n, section.batch, job.reporter.advance)
                for w, n in lengths.items()}

    results = {}
    for which, folder in folders.items():
        model = loading.load_model(folder, dtype, device,
                                   trust_remote_code=recipe.model.trust_remote_code)
        results[which] = measured(forward_of(model))
        del model
    figures = _figures("", section.windows, results["dense"], results["pruned"], tokens_per_byte)
    for prefix, folder in onnx.items():
        from bipdeploy.ort.runtime import OnnxModel

        found = measured(OnnxModel(folder, device.type).logits)
        figures |= _figures(f"{prefix}.", section.windows, results["dense"], found,
                            tokens_per_byte, torch=results["pruned"])
    record = {"protocol": "non-overlapping windows; the first token of each is context only; "
              "token-level", "data": source.name, "split": source.split,
              "text_sha256": source.sha256, "overlap": overlap,
              "dtype": str(dtype), "device": str(device), "tokens_per_byte": tokens_per_byte,
              "tokenised": "all of the text" if whole else "its beginning",
              "windows": {str(w): {"tokens": n, "predicted": results["dense"][w].tokens}
                          for w, n in lengths.items()}}
    return figures, record


def rehearse(resolved: Resolved) -> None:
    """Refuse, before the stages that come first, a test text that cannot be read or, where it holds
    conversations, be written by the model's chat template."""
    recipe = resolved.recipe
    if recipe.evaluate.perplexity.enabled:
        source = _test_text(recipe)
        if source.conversations:
            windows.leading(source, resolved.dense, recipe.evaluate.perplexity.max_tokens)


def _test_text(recipe: Recipe) -> text.Text:
    section = recipe.evaluate.perplexity
    return text.read(section.data, test_split(recipe), section.field, "evaluate.perplexity")


def _figures(prefix: str, names: Sequence[int | str], dense: Mapping[Any, Perplexity],
             pruned: Mapping[Any, Perplexity], tokens_per_byte: float,
             torch: Mapping[Any, Perplexity] | None = None) -> dict[str, float]:
    """Figures of one artefact beside the dense model; `torch`: the same weights in PyTorch."""
    figures: dict[str, float] = {}
    for window in names:
        bases = [""] if window == names[0] else []
        for suffix in (*bases, f".{window}"):
            for base, value in (("perplexity", lambda p: p.perplexity),
                                ("bits_per_byte", lambda p: p.bits_per_byte(tokens_per_byte))):
                name = f"{prefix}{base}{suffix}"
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
    """Share of the test text that the recipe's other texts also hold: `calibration`, and `tune`
    where adapters are trained."""
    used: dict[str, tuple[TextSection, str]] = {
        "calibration": (recipe.calibration, calibration_split(recipe))}
    if recipe.tune.enabled:
        used["tune"] = (recipe.tune, training_split(recipe))
    return {name: _held_by(name, section, split, test)
            for name, (section, split) in used.items()}


def _held_by(name: str, section: TextSection, split: str, test: text.Text) -> float:
    if (section.data, split) == (test.name, test.split):
        return 1.0
    if isinstance(section, TuneSection) and section.format == "alpaca":
        rows = text.records(section.data, split, ALPACA_COLUMNS, name).rows
        other = text.Text(section.data, split, tuple(" ".join(row.values()) for row in rows))
    else:
        other = text.read(section.data, split, section.field, name)
    return windows.overlap(other, test)
