"""The recipe's section `calibration`: the text that scores and repairs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from bipdeploy.recipe.base import TextSection


class CalibrationSection(TextSection):
    """The text that scores and repairs the model. Never the text it is tested on."""

    samples: PositiveInt | None = Field(
        None, description="Windows drawn at random, without overlap. Default: as many as "
        "`tokens_per_channel` asks for.")
    tokens_per_channel: Annotated[float, Field(gt=0, le=1000)] | None = Field(
        None, description="Tokens, of all windows together, for each input of the widest "
        "projection that is refitted: of an FFN channel in most models. Default: 12; give it or "
        "`samples`, not both.")
    tokens: int = Field(128, ge=8, description="Tokens in a window.")
    batch: PositiveInt = Field(16, description="Windows that go through a block at once.")
    spill: bool = Field(
        False, description="Keep the windows' hidden states in files below the stage's folder "
        "instead of in memory. Results are the same, bit for bit. 128 windows of 128 tokens of a "
        "7B model take 0.27 GB in float32, several times over during repair and search.")

    @model_validator(mode="after")
    def _one_amount(self) -> CalibrationSection:
        if self.samples is not None and self.tokens_per_channel is not None:
            raise ValueError(f"samples ({self.samples}) and tokens_per_channel "
                             f"({self.tokens_per_channel:g}) both say how much text there is; "
                             "leave one out, or set it to null")
        return self

    @property
    def windows(self) -> int:
        """Windows drawn. Of a recipe that was resolved (`planning/resolved.py`): before that, the
        number may depend on the model."""
        assert self.samples is not None
        return self.samples
