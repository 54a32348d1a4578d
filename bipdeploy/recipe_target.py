"""The recipe's `prune.target` and `model.shape`: budgets, and sizes that need no download.

Imports no torch.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, WithJsonSchema, model_validator

from bipdeploy.recipe_base import Section, Share

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
Kind = Literal["parameters", "flops", "memory", "decode_speedup", "prefill_speedup"]
KINDS: tuple[Kind, ...] = ("parameters", "flops", "memory", "decode_speedup", "prefill_speedup")


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
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(KINDS)}"
                             + (f"; here are {' and '.join(given)}" if given else ""))
        return self

    @property
    def kind(self) -> Kind:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

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


class ShapeSection(Section):
    """The sizes of a model, as its config.json states them.

    `bipdeploy plan` reads them where that file cannot be had; where it can, they must agree.
    """

    model_type: str = Field(description="llama, mistral, qwen2 or qwen3.")
    hidden: PositiveInt = Field(description="Hidden size.")
    intermediate: PositiveInt = Field(description="FFN channels of a block.")
    blocks: PositiveInt = Field(description="Transformer blocks.")
    heads: PositiveInt = Field(description="Query heads of a block.")
    kv_heads: PositiveInt = Field(description="KV heads of a block.")
    head_dim: PositiveInt = Field(description="Size of a head.")
    vocabulary: PositiveInt = Field(description="Rows of the embeddings.")
    tied: bool = Field(False, description="The head shares the embeddings' weights.")
    max_positions: PositiveInt = Field(description="The longest text, in tokens.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        description="Type of the stored weights.")

    @property
    def config(self) -> dict[str, Any]:
        """The same sizes under the names of config.json."""
        return {"model_type": self.model_type, "hidden_size": self.hidden,
                "intermediate_size": self.intermediate, "num_hidden_layers": self.blocks,
                "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
                "head_dim": self.head_dim, "vocab_size": self.vocabulary,
                "tie_word_embeddings": self.tied, "max_position_embeddings": self.max_positions,
                "dtype": self.dtype}
