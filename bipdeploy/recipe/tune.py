"""The recipe's section `tune`: training after the repair. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from bipdeploy.errors import did_you_mean
from bipdeploy.recipe.base import Section, TextSection

# The linear layers of a block that adapters can be put on.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


TuneMethod = Literal["lora", "full"]
RATES: dict[TuneMethod, float] = {"lora": 1e-4, "full": 5e-5}
# Logits that are in memory at once, in float32; the losses go over tokens in slices of so many.
LOGITS_AT_ONCE = 1 << 27


def slice_tokens(vocabulary: int) -> int:
    """Tokens whose logits are in memory at once."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


class DistillationSection(Section):
    """The dense model as the teacher of the pruned one."""

    weight: float | None = Field(
        None, ge=0.0, le=1.0, description="Share w of the loss (1 - w) CE + w KL(dense || pruned), "
        "both on the same tokens. Above 0 the dense model is loaded beside the pruned one. "
        "Default: 0 for `lora`, 1 for `full`.")
    temperature: PositiveFloat = Field(
        1.0, description="Both models' logits are divided by it before KL, which is multiplied by "
        "its square.")
    hidden: float = Field(
        0.0, ge=0.0, description="Weight of a further term: the squared error of all blocks' "
        "outputs, of every token as a share of its dense output's square, so that tokens with huge "
        "activations count as others do. Above 0 the dense model is loaded too.")


class ValidationSection(Section):
    """Windows of the training text that are held back, to choose the best step by."""

    windows: PositiveInt = Field(32, description="Windows held back, drawn at random by `seed`.")
    every: PositiveInt = Field(100, description="Optimiser steps from one evaluation to the next; "
                               "the start and the last step are always evaluated.")
    patience: PositiveInt = Field(5, description="Evaluations in a row without a lower loss, after "
                                  "which training stops.")


class TuneSection(TextSection):
    """Training of the pruned model on text: of low-rank adapters, which are merged into its
    weights, or of all weights, by default towards the dense model's predictions.

    The defaults are meant for 7B parameters and follow LLM-Pruner's (rank 8, learning rate 1e-4,
    64 sequences in a step).
    """

    enabled: bool = Field(False, description="Train after `recover`.")
    method: TuneMethod = Field(
        "lora", description="What is trained. `lora`: low-rank adapters, merged afterwards. "
        "`full`: all weights, which takes about 16 bytes of memory for each of them.")
    split: str | None = Field(
        None, description="Split of a built-in or hub text. Default: calibration (or train).")
    format: Literal["text", "alpaca"] = Field(
        "text", description="`text`: running text or conversations, in the column `field`. "
        "`alpaca`: instructions with the columns instruction, input and output, in Stanford "
        "Alpaca's prompt.")
    loss_on: Literal["response", "all"] = Field(
        "response", description="Tokens of an instruction or a conversation that count in the "
        "loss: those of the response (of all that the assistant says), or the others too. Of "
        "running text all do.")
    tokens: int = Field(128, ge=8, description="Tokens in a window.")
    packing: bool = Field(
        True, description="Put documents one after another and cut the whole into windows. "
        "`false`: one document in a window, cut off or padded; padding counts in no loss.")
    target_modules: list[str] = Field(
        list(PROJECTIONS), min_length=1, description="Projections that get adapters (`lora`).")
    rank: PositiveInt = Field(8, description="Rank of the adapters (`lora`).")
    alpha: PositiveFloat = Field(16.0, description="Adapters are scaled by alpha / rank (`lora`).")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Share of an adapter's inputs that is "
                           "dropped while training (`lora`).")
    learning_rate: PositiveFloat | None = Field(
        None, description="AdamW's, at its highest. Default: 1e-4 for `lora`, 5e-5 for `full`.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "cosine", description="How the learning rate falls after the warm-up: to 0, or not.")
    warmup: float = Field(0.05, ge=0.0, lt=1.0, description="Share of the steps in which the "
                          "learning rate rises from 0.")
    weight_decay: float = Field(0.0, ge=0.0, description="AdamW's, of matrices; norms and "
                                "biases have none.")
    clip: float = Field(1.0, ge=0.0, description="Largest norm of a step's gradient, which is "
                        "scaled down to it; 0: no limit.")
    steps: PositiveInt = Field(1000, description="Optimiser steps at most.")
    batch: PositiveInt = Field(64, description="Windows in one optimiser step, those of all "
                               "processes together.")
    accumulation: PositiveInt = Field(
        8, description="Parts that a step's windows are split into, one after another, to save "
        "memory. Changes the result by rounding only.")
    gradient_checkpointing: bool = Field(
        False, description="Compute activations twice instead of keeping them: less memory, about "
        "a third slower.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Type of the frozen weights and of the products; what is trained is "
        "kept in float32. `auto`: bfloat16 on CUDA, float32 on a CPU.")
    distillation: DistillationSection = Field(default_factory=DistillationSection)
    validation: ValidationSection = Field(default_factory=ValidationSection)
    checkpoint_every: PositiveInt = Field(
        100, description="Optimiser steps from one checkpoint to the next. A run that was "
        "interrupted goes on from the last.")
    keep_adapter: bool = Field(False, description="Also write the adapters in peft's own format, "
                               "to `tune/adapter/` (`lora`).")
    processes: PositiveInt = Field(
        1, description="Processes that train together, one for each GPU. With `full` each holds "
        "a part of the weights and of what AdamW keeps (FSDP).")

    @property
    def rate(self) -> float:
        """The learning rate, where none is given the method's own."""
        return self.learning_rate or RATES[self.method]

    @property
    def kl(self) -> float:
        """The share of KL in the loss, where none is given the method's own."""
        weight = self.distillation.weight
        return float(self.method == "full") if weight is None else weight

    @property
    def unused(self) -> set[str]:
        """The fields that the method does not read."""
        return set() if self.method == "lora" else {"target_modules", "rank", "alpha", "dropout",
                                                    "keep_adapter"}

    @property
    def taught(self) -> bool:
        """Whether the dense model is needed."""
        return self.kl > 0 or self.distillation.hidden > 0

    @field_validator("target_modules")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in PROJECTIONS:
                raise ValueError(f"no projection is called {name!r}"
                                 f"{did_you_mean(name, PROJECTIONS)}")
        return [name for name in PROJECTIONS if name in names]

    @model_validator(mode="after")
    def _adapters_are_there(self) -> TuneSection:
        if self.keep_adapter and self.method == "full":
            raise ValueError("keep_adapter: true, and method full trains no adapters; leave it "
                             "out, or set method: lora")
        return self

    @model_validator(mode="after")
    def _whole_parts(self) -> TuneSection:
        parts = self.accumulation * self.processes
        if self.batch % parts:
            raise ValueError(f"batch {self.batch} does not divide by accumulation x processes "
                             f"({self.accumulation} x {self.processes} = {parts}); change one of "
                             "them")
        return self
