"""The recipe's section `gates`: bounds on figures."""

from __future__ import annotations

from pydantic import Field, model_validator

from bipdeploy.recipe.base import Section


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
