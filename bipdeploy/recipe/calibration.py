"""The recipe's section `calibration`: the text that scores and repairs."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from bipdeploy.recipe.base import TextSection


class CalibrationSection(TextSection):
    """The text that scores and repairs the model. Never the text it is tested on."""

    samples: PositiveInt = Field(128, description="Windows drawn at random, without overlap.")
    tokens: int = Field(128, ge=8, description="Tokens in a window.")
    batch: PositiveInt = Field(16, description="Windows that go through a block at once.")
    spill: bool = Field(
        False, description="Keep the windows' hidden states in files below the stage's folder "
        "instead of in memory. Results are the same, bit for bit. 128 windows of 128 tokens of a "
        "7B model take 0.27 GB in float32, several times over during repair and search.")
