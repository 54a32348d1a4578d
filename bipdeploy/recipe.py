"""The recipe: one typed section per concern, every field documented where it is declared.

Imports no torch. `recipe_file.py` reads recipes from YAML and reports all faults at once.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from bipdeploy.comparison import CompareSection
from bipdeploy.recipe_base import Section, Share, TextSection
from bipdeploy.recipe_bench import BenchSection
from bipdeploy.recipe_lora import LoraSection
from bipdeploy.recipe_sweep import SweepSection
from bipdeploy.recipe_target import ShapeSection, TargetSection


class ModelSection(Section):
    """The dense model, and how it is loaded."""

    id: str = Field(description="`builtin:pico`, a local folder, or a model id on the hub.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type to compute in. `auto`: the checkpoint's own on a GPU, float32 on "
        "a CPU. Statistics are kept in float32 or float64 either way.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="`auto` takes a CUDA GPU where there is one.")
    trust_remote_code: bool = Field(
        False, description="Run Python code that the checkpoint ships. Off unless you say so.")
    shape: ShapeSection | None = Field(
        None, description="The model's sizes, for a plan without network.")


class HardwareSection(Section):
    """What the pruned model will run on."""

    tensor_parallel: PositiveInt = Field(
        1, description="GPUs that vLLM splits every layer over. Widths are chosen so that heads "
        "and FFN channels divide by it.")
    gpu: str | None = Field(None, description="A GPU in bipdeploy/gpus.py, such as H100: what "
                            "`bipdeploy plan` estimates times for. No stage depends on it.")

    @field_validator("gpu", mode="before")
    @classmethod
    def _known(cls, name: object) -> str | None:
        from bipdeploy.gpus import find

        return None if name is None else find(str(name)).name  # 4090 is a number in YAML


class CalibrationSection(TextSection):
    """The text that scores and repairs the model. Never the text it is tested on."""

    samples: PositiveInt = Field(128, description="Windows drawn at random, without overlap.")
    tokens: int = Field(128, ge=8, description="Tokens in a window.")
    batch: PositiveInt = Field(16, description="Windows that go through a block at once.")
    spill: bool = Field(
        False, description="Keep the windows' hidden states in files below the stage's folder "
        "instead of in memory. Results are the same, bit for bit. 128 windows of 128 tokens of a "
        "7B model take 0.27 GB in float32, several times over during repair and search.")


class ScoreSection(Section):
    """How the groups (KV heads with their query heads; FFN channels) are ranked."""

    criterion: str = Field("llm_bip", description="A name in the criteria table.")
    propagation: Literal["bound", "measured"] = Field(
        "bound", description="How LLM-BIP carries a head's influence through the FFN to the "
        "block's output: `bound` (Lipschitz, from one forward pass) or `measured` (one more FFN "
        "pass per head).")

    @field_validator("criterion")
    @classmethod
    def _known(cls, name: str) -> str:
        from bipdeploy.criteria import NAMES
        from bipdeploy.errors import did_you_mean

        if name not in NAMES:
            raise ValueError(f"no criterion is called {name!r}{did_you_mean(name, NAMES)}")
        return name


class ProtectSection(Section):
    """Blocks that stay dense."""

    first: int = Field(0, ge=0, description="How many of the first blocks stay dense.")
    last: int = Field(0, ge=0, description="How many of the last blocks stay dense.")


class SearchSection(Section):
    """How `layers: searched` measures what each width of each part costs."""

    windows: PositiveInt = Field(32, description="Calibration windows, the first of those drawn. "
                                 "All variants of all blocks are in memory at once.")
    points: int = Field(9, ge=2, description="Widths of each part that are measured; the others "
                        "lie on lines between them.")


class DepthSection(Section):
    """Parts that leave as a whole, those with the least influence on the residual stream first."""

    blocks: int = Field(0, ge=0, description="How many whole blocks are dropped.")
    attention: int = Field(0, ge=0, description="How many more attentions are dropped.")
    ffn: int = Field(0, ge=0, description="How many more FFNs are dropped.")

    @property
    def any(self) -> bool:
        return bool(self.blocks or self.attention or self.ffn)


class PruneSection(Section):
    """How much is removed, and where."""

    ratio: Share | None = Field(
        None, description="Share of the parameters of all blocks that is removed (protected blocks "
        "count in the total, embeddings do not). Either this or `target`.")
    target: TargetSection | None = Field(
        None, description="Another budget instead: FLOPs, bytes, or measured speed.")
    layers: Literal["uniform", "global", "adaptive", "searched"] = Field(
        "uniform", description="`uniform`: every unprotected block gets the same widths, and "
        "without protected blocks the result is a stock checkpoint. `global`: heads of all blocks "
        "compete, channels too, and widths differ by block. `adaptive`: heads also compete with "
        "channels, in one ranking (FLAP's). `searched`: widths by block, split between heads and "
        "FFN so that the model's output changes least.")
    search: SearchSection = Field(default_factory=SearchSection)
    depth: DepthSection = Field(
        default_factory=DepthSection, description="What is dropped before widths meet the rest of "
        "the ratio. Protected blocks are spared. With heads and ffn both false, depth alone has "
        "to meet the ratio to within one dropped part.")
    protect: ProtectSection = Field(default_factory=ProtectSection)
    round_to: PositiveInt = Field(
        128, description="FFN widths are multiples of this. 128 suits tensor cores at 7B; 8 suits "
        "tiny models.")
    heads: bool = Field(True, description="Prune attention heads.")
    ffn: bool = Field(True, description="Prune FFN channels.")

    @property
    def wanted(self) -> str:
        """What is asked for, in words."""
        return str(self.target or TargetSection(parameters=self.ratio))

    @property
    def share(self) -> float | None:
        """The share of block parameters to remove, where that is what is asked for."""
        return self.target.parameters if self.target and self.ratio is None else self.ratio

    @model_validator(mode="after")
    def _one_budget(self) -> PruneSection:
        if (self.ratio is None) == (self.target is None):
            raise ValueError("give ratio or target" if self.ratio is None else
                             "ratio and target are both given; keep one (--set prune.ratio=null "
                             "takes the other away)")
        if self.target and not (self.heads or self.ffn):
            raise ValueError("target is met by widths, and heads and ffn are both false; give "
                             "ratio, or set one of them to true")
        return self

    @model_validator(mode="after")
    def _one_search(self) -> PruneSection:
        if self.layers == "searched" and self.depth.any:
            raise ValueError("layers: searched chooses widths for all parts, and depth drops some "
                             "of them; set depth to 0, or layers to uniform, global or adaptive")
        return self

    @model_validator(mode="after")
    def _something(self) -> PruneSection:
        if not (self.heads or self.ffn or self.depth.any):
            raise ValueError("heads and ffn are both false and depth drops nothing, so nothing "
                             "can be pruned; set one to true")
        return self


class RefitSection(Section):
    """Closed-form repair: ridge least squares to the dense model's block outputs."""

    ridge: Annotated[float, Field(ge=0.0)] | Literal["auto"] = Field(
        0.01, description="Pull towards the original weights, as a share of the mean energy of the "
        "kept inputs. `auto`: for every projection what fits the last eighth of the calibration "
        "windows best when it was fitted to the others.")
    reselect: bool = Field(
        False, description="Choose again, block by block and at the same widths, which groups "
        "stay: on the pruned model's own input and jointly with the new weights. Costs about "
        "twice the time.")

    @field_validator("ridge", mode="before")
    @classmethod
    def _one_fault(cls, value: object) -> object:
        """One line for a wrong value, where a union would give one for each of its types."""
        try:
            accepted = value == "auto" or 0 <= float(str(value)) < float("inf")
        except ValueError:
            accepted = False
        if not accepted:
            raise ValueError(f"{value!r} is neither a number from 0 up nor auto")
        return value


class RecoverSection(Section):
    """Repair after slicing."""

    method: Literal["none", "refit", "bias"] = Field(
        "refit", description="`refit`: solve both output projections of each block in closed form, "
        "in sequence. `bias`: the mean output of what was removed becomes a bias (FLAP's repair), "
        "which adds parameters. `none`: leave the sliced weights as they are.")
    refit: RefitSection = Field(default_factory=RefitSection)


class TransformersExport(Section):
    """A safetensors folder that `AutoModelForCausalLM.from_pretrained` loads."""

    enabled: bool = Field(True, description="Write this target.")


class VllmExport(Section):
    """A folder that vLLM serves, checked in every engine that is installed."""

    enabled: bool = Field(False, description="Write this target.")
    prompts: PositiveInt = Field(4, description="Prompts of random tokens that every engine "
                                 "continues; lengths differ.")
    new_tokens: PositiveInt = Field(16, description="Tokens that are generated for each, greedily.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Type of the comparison. In float32 the tokens must be equal; in 16 "
        "bits only the log-probabilities are judged, since rounding turns greedy choices.")


class OnnxExport(Section):
    """An ONNX graph with a KV cache, checked in ONNX Runtime. Needs the extra `onnx`."""

    enabled: bool = Field(False, description="Write this target.")
    style: Literal["auto", "gqa", "std"] = Field(
        "auto", description="`gqa`: ONNX Runtime's fused GroupQueryAttention, fast, right padding "
        "only. `std`: standard operators (opset 24), any padding. `auto`: `gqa`, and `std` where "
        "float32 runs on a GPU, which has no such kernel.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="Type of the weights. `auto`: what the recipe computes in.")
    quantize: list[Literal["int8_dynamic", "int8", "int4"]] = Field(
        [], description="Quantised copies beside it, by ONNX Runtime's own quantisers, each "
        "measured on its own: `int8` and `int4` store weights so, `int8_dynamic` computes in "
        "8 bits too.")


class ExportSection(Section):
    """What is written for others to load; one field per target in the exporters' table."""

    transformers: TransformersExport = Field(default_factory=TransformersExport)
    vllm: VllmExport = Field(default_factory=VllmExport)
    onnx: OnnxExport = Field(default_factory=OnnxExport)


class PerplexitySection(TextSection):
    """Token-level perplexity over non-overlapping windows."""

    enabled: bool = Field(True, description="Measure perplexity, dense and pruned.")
    windows: list[Annotated[int, Field(ge=2)] | Literal["max"]] = Field(
        [128], min_length=1, description="Window lengths in tokens; the first is the one that "
        "`perplexity.ratio` means. `max` is the model's maximum, at most 2048.")
    max_tokens: PositiveInt | None = Field(
        None, description="Read at most this many tokens of the text. Default: all.")
    batch: PositiveInt = Field(8, description="Windows in a batch.")


class ZeroShotSection(Section):
    """Accuracy on multiple-choice tasks, by EleutherAI's lm-eval. Needs the extra `eval`."""

    enabled: bool = Field(False, description="Measure accuracy, dense and pruned.")
    tasks: list[str] = Field(
        ["builtin:pydocs_choice"], min_length=1, description="Names of lm-eval's multiple-choice "
        "tasks (hub); `llm_bip_7` for boolq, piqa, hellaswag, winogrande, arc_easy, arc_challenge "
        "and openbookqa; `builtin:pydocs_choice` (which docstring belongs to a signature, on every "
        "machine); or a path with a slash to a YAML file, or a folder of them, that defines tasks "
        "as lm-eval's do (Python functions that it names are run).")
    batch: PositiveInt = Field(8, description="Answers in a batch.")
    limit: PositiveInt | None = Field(
        None, description="Take at most this many documents of each task, the first ones. "
        "Default: all.")
    few_shot: int = Field(0, ge=0, description="Solved examples before each question.")
    seed: int = Field(1234, ge=0, description="Draws these examples; lm-eval's own default.")

    @field_validator("tasks")
    @classmethod
    def _there(cls, tasks: list[str]) -> list[str]:
        from bipdeploy.tasks import fault

        faults = [message for task in tasks if (message := fault(task))]
        if faults:
            raise ValueError("\n".join(faults))
        return tasks


class EvaluateSection(Section):
    """How good the pruned model is, beside the dense one."""

    perplexity: PerplexitySection = Field(default_factory=PerplexitySection)
    zero_shot: ZeroShotSection = Field(default_factory=ZeroShotSection)


class Bounds(Section):
    """What a figure must satisfy."""

    min: float | None = Field(None, description="The figure must be at least this.")
    max: float | None = Field(None, description="The figure must be at most this.")

    @model_validator(mode="after")
    def _one(self) -> Bounds:
        if self.min is None and self.max is None:
            raise ValueError("a gate needs a min or a max")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}")
        return self


class Recipe(Section):
    """From a dense model to a pruned one that is proven: what `bipdeploy run` does."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
                      description="Names the run's folder under runs/.")
    seed: int = Field(0, ge=0, description="Draws the calibration windows, random scores, and "
                      "what LoRA holds back, starts from and reads next.")
    model: ModelSection
    hardware: HardwareSection = Field(default_factory=HardwareSection)
    calibration: CalibrationSection = Field(default_factory=CalibrationSection)
    score: ScoreSection = Field(default_factory=ScoreSection)
    prune: PruneSection
    recover: RecoverSection = Field(default_factory=RecoverSection)
    lora: LoraSection = Field(default_factory=LoraSection)
    export: ExportSection = Field(default_factory=ExportSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    bench: BenchSection = Field(default_factory=BenchSection)
    compare: CompareSection = Field(default_factory=CompareSection)
    sweep: SweepSection = Field(default_factory=SweepSection)
    gates: dict[str, Bounds] = Field(
        default_factory=dict, description="Figure name → bounds. Exit code 3 where one is not met.")

    @model_validator(mode="after")
    def _some_windows_are_left(self) -> Recipe:
        if (self.recover.method == "refit" and self.recover.refit.ridge == "auto"
                and self.calibration.samples < 2):
            raise ValueError("recover.refit.ridge: auto holds calibration windows back, and "
                             "calibration.samples is 1; raise it, or give a number")
        return self

    @model_validator(mode="after")
    def _onnx_is_written(self) -> Recipe:
        if self.bench.onnx.enabled and not self.export.onnx.enabled:
            raise ValueError("bench.onnx.enabled: true, and export.onnx.enabled is false, so there "
                             "is nothing to measure; set both or none")
        return self

    @model_validator(mode="after")
    def _gates_are_measured(self) -> Recipe:
        from bipdeploy.errors import did_you_mean
        from bipdeploy.figures import expected

        known = expected(self)
        faults = [f"gates.{name}: no enabled stage measures {name!r}{did_you_mean(name, known)}"
                  for name in self.gates if name not in known]
        if faults:
            raise ValueError("\n".join(faults))
        return self
