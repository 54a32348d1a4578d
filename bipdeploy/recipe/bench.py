"""The recipe's `bench` section: one part for each engine. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from bipdeploy.recipe.base import Section, Share


class TorchBench(Section):
    """Latency and throughput in PyTorch, dense and pruned interleaved."""

    enabled: bool = Field(True, description="Measure it.")
    batch: PositiveInt = Field(1, description="Sequences at once.")
    prompt_tokens: PositiveInt = Field(128, description="Tokens of the prompt (prefill).")
    new_tokens: int = Field(32, ge=2, description="Tokens generated after it (decode).")
    repeats: int = Field(10, ge=3, description="Timed rounds; each runs dense and pruned once.")
    warmup: int = Field(2, ge=0, description="Rounds before timing starts.")
    memory: bool = Field(True, description="Measure peak memory, each model in its own process.")


class OnnxBench(Section):
    """Latency in ONNX Runtime of what `export.onnx` wrote, dense and PyTorch beside it."""

    enabled: bool = Field(False, description="Measure it.")
    batch: PositiveInt = Field(1, description="Sequences at once.")
    prompt_tokens: PositiveInt = Field(128, description="Tokens of the prompt (prefill).")
    new_tokens: int = Field(32, ge=2, description="Tokens generated after it (decode).")
    repeats: int = Field(10, ge=3, description="Timed rounds; each runs every model once.")
    warmup: int = Field(2, ge=0, description="Rounds before timing starts.")


class VllmBench(Section):
    """Throughput and latency in vLLM, by its own benchmark tools, dense beside pruned."""

    enabled: bool = Field(False, description="Measure it.")
    prompt_tokens: PositiveInt = Field(128, description="Tokens of each prompt.")
    new_tokens: int = Field(64, ge=2, description="Tokens generated for each prompt.")
    requests: PositiveInt = Field(64, description="Requests in one measurement.")
    concurrency: list[PositiveInt] = Field(
        [1, 8], description="Numbers of requests in flight at which the server is measured.")
    request_rates: list[Annotated[float, Field(gt=0)]] = Field(
        [], description="Requests per second (Poisson) at which the server is measured.")
    rounds: int = Field(3, ge=2, description="Measurements of each point of each server. Both "
                        "servers are up at once and take turns.")
    offline_rounds: int = Field(2, ge=2, description="Runs of the throughput and the latency tool "
                                "for each model, in turns. Every run starts an engine.")
    latency_batch: PositiveInt = Field(8, description="Sequences at once in the latency tool.")
    eager: Literal["auto"] | bool = Field(
        "auto", description="Neither torch.compile nor CUDA graphs. `auto`: only on a CPU, where "
        "compiling takes minutes.")
    gpu_memory: Share = Field(0.42, description="Share of the GPU's memory that each of the two "
                              "servers takes.")
    cpu_cache_gib: PositiveInt = Field(1, description="KV cache of each server on a CPU, GiB.")

    @model_validator(mode="after")
    def _some_load(self) -> VllmBench:
        if not (self.concurrency or self.request_rates):
            raise ValueError("concurrency and request_rates are both empty; give one of them a "
                             "value")
        return self


class BenchSection(Section):
    """How fast the pruned model is, beside the dense one in the same run."""

    torch: TorchBench = Field(default_factory=TorchBench)
    vllm: VllmBench = Field(default_factory=VllmBench)
    onnx: OnnxBench = Field(default_factory=OnnxBench)
