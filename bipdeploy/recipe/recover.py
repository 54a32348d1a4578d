"""The recipe's section `recover`: the repair after slicing."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from bipdeploy.recipe.base import Section
from bipdeploy.recipe.names import Repair

# What `ridge: auto` chooses from.
RIDGES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


class RefitSection(Section):
    """Closed-form repair: ridge least squares to the dense model's block outputs."""

    ridge: Annotated[float, Field(ge=0.0)] | Literal["auto"] = Field(
        "auto", description="Pull towards the original weights, as a share of the mean energy of "
        "the kept inputs. `auto`: for every projection what fits the last eighth of the "
        "calibration windows best when it was fitted to the others.")
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

    method: Repair = Field(
        "refit", description="`refit`: solve both output projections of each block in closed form, "
        "in sequence. `bias`: the mean output of what was removed becomes a bias (FLAP's repair), "
        "which adds parameters. `none`: leave the sliced weights as they are.")
    refit: RefitSection = Field(default_factory=RefitSection)

    @property
    def fitting(self) -> float | Literal["auto"] | None:
        """The ridge of the refit; None where another repair is asked for."""
        return self.refit.ridge if self.method == "refit" else None

    @property
    def used(self) -> dict[str, Any]:
        """The fields that the method reads."""
        return self.model_dump(exclude=set() if self.method == "refit" else {"refit"})
