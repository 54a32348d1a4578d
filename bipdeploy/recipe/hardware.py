"""The recipe's section `hardware`: what the pruned model will run on."""

from __future__ import annotations

from pydantic import Field, PositiveInt, field_validator

from bipdeploy.recipe.base import Section
from bipdeploy.recipe.names import GPUS, gpu_name


class HardwareSection(Section):
    """What the pruned model will run on."""

    tensor_parallel: PositiveInt = Field(
        1, description="GPUs that vLLM splits every layer over. Widths are chosen so that heads "
        "and FFN channels divide by it.")
    gpu: str | None = Field(
        None, description="What `bipdeploy plan` estimates times for, such as H100. No stage "
        "depends on it.", json_schema_extra={"examples": list(GPUS)})

    @field_validator("gpu", mode="before")
    @classmethod
    def _known(cls, name: object) -> str | None:
        return None if name is None else gpu_name(str(name))  # 4090 is a number in YAML
