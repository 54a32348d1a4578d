"""The recipe: one typed section per concern, each in a file of its own.

Every field is documented where it is declared. `file.py` reads recipes from YAML and reports all
faults at once.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from bipdeploy.errors import did_you_mean
from bipdeploy.recipe.base import Section
from bipdeploy.recipe.bench import BenchSection
from bipdeploy.recipe.calibration import CalibrationSection
from bipdeploy.recipe.compare import CompareSection
from bipdeploy.recipe.evaluate import EvaluateSection
from bipdeploy.recipe.export import ExportSection
from bipdeploy.recipe.figures import expected
from bipdeploy.recipe.gates import Bounds
from bipdeploy.recipe.hardware import HardwareSection
from bipdeploy.recipe.model import ModelSection
from bipdeploy.recipe.prune import PruneSection
from bipdeploy.recipe.recover import RecoverSection
from bipdeploy.recipe.score import ScoreSection
from bipdeploy.recipe.sweep import SweepSection
from bipdeploy.recipe.tune import TuneSection


class Recipe(Section):
    """From a dense model to a pruned one that is proven: what `bipdeploy run` does."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
                      description="Names the run's folder under runs/.")
    seed: int = Field(0, ge=0, description="Draws the calibration windows, random scores, and "
                      "what training holds back, starts from and reads next.")
    model: ModelSection
    hardware: HardwareSection = Field(default_factory=HardwareSection)
    calibration: CalibrationSection = Field(default_factory=CalibrationSection)
    score: ScoreSection = Field(default_factory=ScoreSection)
    prune: PruneSection
    recover: RecoverSection = Field(default_factory=RecoverSection)
    tune: TuneSection = Field(default_factory=TuneSection)
    export: ExportSection = Field(default_factory=ExportSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    bench: BenchSection = Field(default_factory=BenchSection)
    compare: CompareSection = Field(default_factory=CompareSection)
    sweep: SweepSection = Field(default_factory=SweepSection)
    gates: dict[str, Bounds] = Field(
        default_factory=dict, description="Figure name → bounds. Exit code 3 where one is not met.")

    @model_validator(mode="after")
    def _some_windows_are_left(self) -> Recipe:
        samples, chosen = self.calibration.samples, self.recover.refit.ridge == "auto"
        if self.recover.method != "refit" or samples is None:
            return self
        if chosen and samples < 2:
            raise ValueError("recover.refit.ridge: auto holds calibration windows back, and "
                             "calibration.samples is 1; raise it, or give a number")
        if self.prune.tries_widths and samples < 2 + chosen:
            raise ValueError(f"prune.layers: {self.prune.layers} judges refits by calibration "
                             "windows that they have not seen, and calibration.samples is "
                             f"{samples}; give at least {2 + chosen}")
        return self

    @model_validator(mode="after")
    def _onnx_is_written(self) -> Recipe:
        if self.bench.onnx.enabled and not self.export.onnx.enabled:
            raise ValueError("bench.onnx.enabled: true, and export.onnx.enabled is false, so there "
                             "is nothing to measure; set both or none")
        return self

    @model_validator(mode="after")
    def _gates_are_measured(self) -> Recipe:
        known = expected(self)
        faults = [f"gates.{name}: no enabled stage measures {name!r}{did_you_mean(name, known)}"
                  for name in self.gates if name not in known]
        if faults:
            raise ValueError("\n".join(faults))
        return self
