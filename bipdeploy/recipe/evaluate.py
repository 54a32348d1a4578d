"""The recipe's section `evaluate`: how good the pruned model is."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator

from bipdeploy.recipe.base import DATA, Section, TextSection
from bipdeploy.recipe.tasks import fault

# What comes after `perplexity.` in other figures: a text of that name could not be told from them.
_TAKEN = ("max", "dense", "pruned", "ratio", "versus_torch")


class FurtherText(TextSection):
    """A text that perplexity is measured on besides `evaluate.perplexity.data`."""

    data: str = Field(description=DATA)


class PerplexitySection(TextSection):
    """Token-level perplexity over non-overlapping windows."""

    enabled: bool = Field(True, description="Measure perplexity, dense and pruned.")
    texts: dict[str, FurtherText] = Field(
        default_factory=dict, description="Further texts by name, such as `code: {data: "
        "code.jsonl, field: content}`, measured in the same windows. Their figures bear the name: "
        "`perplexity.code.ratio`.")
    windows: list[Annotated[int, Field(ge=2)] | Literal["max"]] = Field(
        [128], min_length=1, description="Window lengths in tokens; the first is the one that "
        "`perplexity.ratio` means. `max` is the model's maximum, at most 2048.")
    max_tokens: PositiveInt | None = Field(
        None, description="Read at most this many tokens of each text. Default: all.")
    batch: PositiveInt = Field(8, description="Windows in a batch.")

    @field_validator("texts")
    @classmethod
    def _names_of_figures(cls, texts: dict[str, FurtherText]) -> dict[str, FurtherText]:
        faults = [f"{name!r} is no name for a text's figures; use letters, digits and _, no digit "
                  "first" for name in texts if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)]
        faults += [f"perplexity.{name} is another figure; call the text something else"
                   for name in texts if name in _TAKEN]
        if faults:
            raise ValueError("\n".join(faults))
        return texts

    @property
    def every(self) -> dict[str, TextSection]:
        """All texts by name; that of `data`, the first, has none."""
        return {"": self, **self.texts}


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
        faults = [message for task in tasks if (message := fault(task))]
        if faults:
            raise ValueError("\n".join(faults))
        return tasks


class EvaluateSection(Section):
    """How good the pruned model is, beside the dense one."""

    perplexity: PerplexitySection = Field(default_factory=PerplexitySection)
    zero_shot: ZeroShotSection = Field(default_factory=ZeroShotSection)


def text_field(name: str) -> str:
    """The section of a text in `PerplexitySection.every`, for messages."""
    return f"evaluate.perplexity.texts.{name}" if name else "evaluate.perplexity"
