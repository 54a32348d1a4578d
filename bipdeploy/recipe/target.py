"""The recipe's `prune.target`: what the pruned model is to cost, in other units than parameters."""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import BeforeValidator, Field, PositiveInt, WithJsonSchema, model_validator

from bipdeploy.recipe.base import Section, Share
from bipdeploy.recipe.names import TARGETS, TargetKind

_UNITS = {"": 1, "b": 1, **{f"{p}b": 1000 ** n for n, p in enumerate("kmgt", 1)},
          **{f"{p}ib": 1024 ** n for n, p in enumerate("kmgt", 1)}}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d*)?(?:e\+?\d+)?)\s*([kmgt]?i?b|)\s*", re.IGNORECASE)


def parse_bytes(value: object) -> int:
    """`9.0GB` (10^9), `512MiB` (2^20) or a number of bytes. Raises ValueError for anything else."""
    found = _AMOUNT.fullmatch(str(value)) if not isinstance(value, bool) else None
    if not found or found[2].lower() not in _UNITS:
        raise ValueError(f"{value!r} is no amount of memory; write 9.0GB, 512MiB or bytes")
    if not math.isfinite(amount := float(found[1]) * _UNITS[found[2].lower()]):
        raise ValueError(f"{value!r} is more memory than there is")
    return int(amount)


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0), WithJsonSchema(
    {"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "string"}]})]
SpeedUp = Annotated[float, Field(gt=1.0)]


class TargetSection(Section):
    """What the pruned model is to cost: exactly one of the first five fields."""

    parameters: Share | None = Field(
        None, description="Share of the parameters of all blocks that is removed; as `ratio`.")
    flops: Share | None = Field(
        None, description="Share of the FLOPs of all blocks that is removed, in the prefill of "
        "`context` tokens, attention scores included.")
    memory: Bytes | None = Field(
        None, description="Bytes of the exported weights, embeddings included, and with `context` "
        "of the KV cache too: `9.0GB`, `512MiB` or a number.")
    decode_speedup: SpeedUp | None = Field(
        None, description="How many times as fast as the dense model one decode step in PyTorch is "
        "to be, by times measured on this machine (`bipdeploy profile`).")
    prefill_speedup: SpeedUp | None = Field(None, description="The same of the prefill.")
    batch: PositiveInt = Field(1, description="Sequences at once (memory, speed-ups).")
    context: PositiveInt | None = Field(
        None, description="Tokens of each. Default: 128; of `memory`, no KV cache.")

    @model_validator(mode="after")
    def _one(self) -> TargetSection:
        given = [kind for kind in TARGETS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(TARGETS)}"
                             + (f"; here are {' and '.join(given)}" if given else ""))
        return self

    @property
    def kind(self) -> TargetKind:
        return next(kind for kind in TARGETS if getattr(self, kind) is not None)

    @property
    def asked(self) -> float:
        return getattr(self, self.kind)

    @property
    def tokens(self) -> int:
        """Tokens of each sequence: `context`, or its default."""
        return self.context or (0 if self.kind == "memory" else 128)

    @property
    def timed(self) -> bool:
        """Whether it is about times of this machine."""
        return self.kind.endswith("speedup")

    def __str__(self) -> str:
        if self.timed:
            phase = self.kind.removesuffix("_speedup")
            return f"{phase} {self.asked:g} times as fast, by this machine's times"
        if self.kind == "memory":
            return f"at most {self.asked / 1e9:.4g} GB of weights" + (
                " and KV cache" if self.tokens else "")
        what = "block parameters" if self.kind == "parameters" else "the blocks' prefill FLOPs"
        return f"{self.asked * 100:.3g}% of {what} removed"
