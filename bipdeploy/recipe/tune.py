"""The recipe's section `tune`: training after the repair. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from bipdeploy.errors import did_you_mean
from bipdeploy.recipe.base import Section, TextSection

# The linear layers of a block that adapters can be put on.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class DistillationSection(Section):
    """The dense model as the teacher of the pruned one."""

    weight: float = Field(
        0.0, ge=0.0, le=1.0, description="Share w of the loss (1 - w) CE + w KL(dense || pruned), "
        "both on the same tokens. Above 0 the dense model is loaded beside the pruned one.")
    temperature: PositiveFloat = Field(
        1.0, description="Both models' logits are divided by it before KL, which is multiplied by "
        "its square.")


class ValidationSection(Section):
    """Windows of the training text that are held back, to choose the best step by."""

    windows: PositiveInt = Field(32, description="Windows held back, drawn at random by `seed`.")
    every: PositiveInt = Field(100, description="Optimiser steps from one evaluation to the next; "
                               "the start and the last step are always evaluated.")
    patience: PositiveInt = Field(5, description="Evaluations in a row without a lower loss, after "
                                  "which training stops.")


class TuneSection(TextSection):
    """Low-rank adapters, trained on text and merged into the pruned weights.

    The defaults are meant for 7B parameters and follow LLM-Pruner's (rank 8, learning rate 1e-4,
    64 sequences in a step).
    """

    enabled: bool = Field(False, description="Train after `recover`.")
    method: Literal["lora"] = Field(
        "lora", description="`lora`: low-rank adapters, merged afterwards.")
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
        list(PROJECTIONS), min_length=1, description="Projections that get adapters.")
    rank: PositiveInt = Field(8, description="Rank of the adapters.")
    alpha: PositiveFloat = Field(16.0, description="Adapters are scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Share of an adapter's inputs that is "
                           "dropped while training.")
    learning_rate: PositiveFloat = Field(1e-4, description="AdamW's, at its highest.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "cosine", description="How the learning rate falls after the warm-up: to 0, or not.")
    warmup: float = Field(0.05, ge=0.0, lt=1.0, description="Share of the steps in which the "
                          "learning rate rises from 0.")
    weight_decay: float = Field(0.0, ge=0.0, description="AdamW's, of the adapters.")
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
        "auto", description="Type of the frozen weights and of the products; adapters are always "
        "float32. `auto`: bfloat16 on CUDA, float32 on a CPU.")
    distillation: DistillationSection = Field(default_factory=DistillationSection)
    validation: ValidationSection = Field(default_factory=ValidationSection)
    checkpoint_every: PositiveInt = Field(
        100, description="Optimiser steps from one checkpoint to the next. A run that was "
        "interrupted goes on from the last.")
    keep_adapter: bool = Field(False, description="Also write the adapters in peft's own format, "
                               "to `tune/adapter/`.")
    processes: PositiveInt = Field(
        1, description="Processes that train together, one for each GPU.")

    @field_validator("target_modules")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in PROJECTIONS:
                raise ValueError(f"no projection is called {name!r}"
                                 f"{did_you_mean(name, PROJECTIONS)}")
        return [name for name in PROJECTIONS if name in names]

    @model_validator(mode="after")
    def _whole_parts(self) -> TuneSection:
        parts = self.accumulation * self.processes
        if self.batch % parts:
            raise ValueError(f"batch {self.batch} does not divide by accumulation x processes "
                             f"({self.accumulation} x {self.processes} = {parts}); change one of "
                             "them")
        return self
