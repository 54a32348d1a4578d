"""The recipe's section `export`: what is written for others to load."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from bipdeploy.recipe.base import Section


class TransformersExport(Section):
    """A safetensors folder that `AutoModelForCausalLM.from_pretrained` loads."""

    enabled: bool = Field(True, description="Write this target.")


class VllmExport(Section):
    """A folder that vLLM serves, checked in every engine that is installed."""

    enabled: bool = Field(False, description="Write this target.")
    prompts: PositiveInt = Field(4, description="Prompts of random tokens that every engine "
                                 "continues; lengths differ.")
    new_tokens: PositiveInt = Field(16, description="Tokens that are generated for each, greedily.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the comparison. In float32 the tokens must be equal; in 16 "
        "bits only the log-probabilities are judged, since rounding turns greedy choices. `auto`: "
        "float32 on a CPU; on a GPU what the recipe computes in, since kernels there may round "
        "float32 to TF32.")


class OnnxExport(Section):
    """An ONNX graph with a KV cache, checked in ONNX Runtime. Needs the extra `onnx`."""

    enabled: bool = Field(False, description="Write this target.")
    style: Literal["auto", "gqa", "std"] = Field(
        "auto", description="`gqa`: ONNX Runtime's fused GroupQueryAttention, fast, right padding "
        "only. `std`: standard operators (opset 24), any padding. `auto`: `gqa`, and `std` where "
        "float32 runs on a GPU, which has no such kernel.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="Type of the weights. `auto`: what the recipe computes in, and float16 "
        "on a GPU for bfloat16, and for float32 with the style gqa: not every onnxruntime has all "
        "kernels for these there.")
    quantize: list[Literal["int8_dynamic", "int8", "int4"]] = Field(
        [], description="Quantised copies beside it, by ONNX Runtime's own quantisers, each "
        "measured on its own: `int8` and `int4` store weights so, `int8_dynamic` computes in "
        "8 bits too.")


class ExportSection(Section):
    """What is written for others to load; one field per target in the exporters' table."""

    transformers: TransformersExport = Field(default_factory=TransformersExport)
    vllm: VllmExport = Field(default_factory=VllmExport)
    onnx: OnnxExport = Field(default_factory=OnnxExport)
