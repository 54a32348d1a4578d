"""The recipe's section `score`: how groups are ranked."""

from __future__ import annotations

from pydantic import Field, field_validator

from bipdeploy.errors import did_you_mean
from bipdeploy.recipe.base import Section
from bipdeploy.recipe.names import CRITERIA, Propagation


class ScoreSection(Section):
    """How the groups (KV heads with their query heads; FFN channels) are ranked."""

    criterion: str = Field("llm_bip", description="What ranks the groups, by name.",
                           json_schema_extra={"enum": list(CRITERIA)})
    propagation: Propagation = Field(
        "bound", description="How LLM-BIP carries a head's influence through the FFN to the "
        "block's output: `bound` (Lipschitz, from one forward pass) or `measured` (one more FFN "
        "pass per head).")

    @field_validator("criterion")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in CRITERIA:
            raise ValueError(f"no criterion is called {name!r}{did_you_mean(name, CRITERIA)}")
        return name
