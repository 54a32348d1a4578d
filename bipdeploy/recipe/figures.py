"""The names of the figures that stages report and gates may use. Imports no torch.

A figure comes as `<name>.dense`, `<name>.pruned` and `<name>.ratio` (pruned / dense) or, for
times and rates, `<name>.speedup` (above 1: the pruned model is faster).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from bipdeploy.recipe import tasks
from bipdeploy.recipe.bench import BenchSection, VllmBench
from bipdeploy.recipe.evaluate import EvaluateSection, PerplexitySection
from bipdeploy.recipe.export import ExportSection, OnnxExport
from bipdeploy.recipe.prune import PruneSection
from bipdeploy.recipe.tune import TuneSection

COMPARED = ("dense", "pruned", "ratio")
TIMED = ("dense", "pruned", "speedup")
# The exported model against its PyTorch twin: a ratio of perplexities, or how many times faster.
VERSUS_TORCH = "versus_torch"
# What guessing gets: the mean of one over the number of answers.
CHANCE = "chance"
# Validation loss in nats before training and after merging; what rounding did to the logits.
TUNE = ("tune.loss.before", "tune.loss.after", "tune.merge.max_logit_difference")
VLLM_PERCENTILES = (50, 90, 99)


class Sections(Protocol):
    """The part of a recipe that its figures follow from."""

    @property
    def prune(self) -> PruneSection: ...
    @property
    def tune(self) -> TuneSection: ...
    @property
    def export(self) -> ExportSection: ...
    @property
    def evaluate(self) -> EvaluateSection: ...
    @property
    def bench(self) -> BenchSection: ...


def expected(recipe: Sections) -> set[str]:
    """Every figure that a run of `recipe` measures."""
    names = {f"{base}.{kind}" for base in ("parameters", "block_parameters", "weights_bytes",
                                           "kv_bytes_per_token") for kind in COMPARED}
    if recipe.prune.target and recipe.prune.target.kind != "parameters":
        names |= {f"prune.target.{kind}" for kind in ("asked", "reached")}
    if recipe.tune.enabled:
        names |= set(TUNE)
    if recipe.evaluate.perplexity.enabled:
        for base in perplexity_names(recipe.evaluate.perplexity):
            names |= {f"{base}.{kind}" for kind in COMPARED}
    if recipe.evaluate.zero_shot.enabled:
        for base in accuracy_names(tasks.names(recipe.evaluate.zero_shot.tasks)):
            names |= {f"{base}.{kind}" for kind in (*COMPARED, CHANCE)}
    if recipe.bench.torch.enabled:
        names |= {f"{base}.{kind}" for base in ("prefill", "decode", "ttft") for kind in TIMED}
        if recipe.bench.torch.memory:
            names |= {f"memory.{kind}" for kind in COMPARED}
    if recipe.bench.vllm.enabled:
        names |= {f"{base}.{kind}" for base in vllm_names(recipe.bench.vllm) for kind in TIMED}
        names |= {f"vllm.{base}.{kind}" for base in ("kv_tokens", "startup") for kind in COMPARED}
    if recipe.export.vllm.enabled:
        names.add("vllm.verified")
    for prefix in onnx_prefixes(recipe.export.onnx):
        names |= {f"{prefix}.bytes.{kind}" for kind in COMPARED}
        if recipe.evaluate.perplexity.enabled:
            for base in perplexity_names(recipe.evaluate.perplexity):
                names |= {f"{prefix}.{base}.{kind}" for kind in (*COMPARED, VERSUS_TORCH)}
        if recipe.bench.onnx.enabled:
            names |= {f"{prefix}.{base}.{kind}" for base in ("prefill", "decode", "ttft")
                      for kind in (*TIMED, VERSUS_TORCH)}
    return names


def onnx_prefixes(section: OnnxExport) -> list[str]:
    """`onnx`, then one prefix per quantised copy; none where the target is not written."""
    return ["onnx", *(f"onnx.{v}" for v in section.quantize)] if section.enabled else []


def load_points(section: VllmBench) -> dict[str, dict[str, float]]:
    """Name of every load at which vLLM's server is measured → flags of its benchmark tool."""
    return {**{f"c{count}": {"max_concurrency": count} for count in section.concurrency},
            **{f"r{rate:g}": {"request_rate": rate} for rate in section.request_rates}}


def vllm_names(section: VllmBench) -> list[str]:
    """`vllm.throughput`, `vllm.latency`, and what is measured at every load of the server."""
    measures = ["requests", "output_tokens"] + [
        f"{metric}.p{p}" for metric in ("ttft", "tpot", "itl") for p in VLLM_PERCENTILES]
    return ["vllm.throughput", "vllm.latency"] + [
        f"vllm.serve.{point}.{measure}" for point in load_points(section) for measure in measures]


def perplexity_names(section: PerplexitySection) -> list[str]:
    """`perplexity` and `bits_per_byte` (the first window), then one of each per window; the same
    with the name of every further text, such as `perplexity.code` and `perplexity.code.128`."""
    return [base + suffix for text in section.every for suffix in
            (text_suffix(text), *(f"{text_suffix(text)}.{window}" for window in section.windows))
            for base in ("perplexity", "bits_per_byte")]


def text_suffix(text: str) -> str:
    """What a text's name adds to that of a figure."""
    return f".{text}" if text else ""


def accuracy_names(names: Sequence[str]) -> list[str]:
    """`accuracy` (the unweighted mean over tasks), then one per task."""
    return ["accuracy", *(f"accuracy.{name}" for name in names)]


def compared(name: str, dense: float, pruned: float) -> dict[str, float]:
    """The three figures of a quantity where less or more is not better by itself."""
    return {f"{name}.dense": dense, f"{name}.pruned": pruned, f"{name}.ratio": pruned / dense}
