"""The recipe's section `model`: which one, how it is loaded, and sizes that need no download."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt

from bipdeploy.recipe.base import Section


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


class ModelSection(Section):
    """The dense model, and how it is loaded."""

    id: str = Field(description="`builtin:pico`, a local folder, a GGUF file, or a model id on the "
                    "hub.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type to compute in. `auto`: the checkpoint's own on a GPU, float32 on "
        "a CPU. Statistics are kept in float32 or float64 either way.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="`auto` takes a CUDA GPU where there is one.")
    devices: PositiveInt = Field(
        1, description="GPUs that scoring shares its windows out to, the first that CUDA shows. "
        "The others are left alone. Where widths are chosen jointly one GPU does most of the work.")
    trust_remote_code: bool = Field(
        False, description="Run Python code that the checkpoint ships. Off unless you say so.")
    dequantize: bool = Field(
        False, description="Read quantised weights (FP8 blocks, compressed-tensors) as bfloat16. "
        "The dense model that is measured is that one.")
    shape: ShapeSection | None = Field(
        None, description="The model's sizes, for a plan without network.")
