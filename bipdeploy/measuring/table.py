"""The table of engines that speed is measured in.

A function takes a `Job` and returns figures and details.
"""

from __future__ import annotations

from bipdeploy.errors import InputError
from bipdeploy.planning.resolved import Resolved
from bipdeploy.table import Row, by_name


def refuse_torch(resolved: Resolved) -> None:
    """Raise InputError where what is to be timed is longer than the model's maximum."""
    bench, longest = resolved.recipe.bench.torch, resolved.architecture.max_positions
    if bench.prompt_tokens + bench.new_tokens > longest:
        raise InputError(f"bench.torch: prompt_tokens {bench.prompt_tokens} and new_tokens "
                         f"{bench.new_tokens} pass the model's maximum of {longest}; lower them")


def refuse_vllm(resolved: Resolved) -> None:
    """As `refuse_torch`; vLLM wants room for one token more."""
    vllm, longest = resolved.recipe.bench.vllm, resolved.architecture.max_positions
    if vllm.prompt_tokens + vllm.new_tokens >= longest:
        raise InputError(f"bench.vllm: prompt_tokens {vllm.prompt_tokens} and new_tokens "
                         f"{vllm.new_tokens} do not leave one token of the model's maximum of "
                         f"{longest}; lower them")


# Names are the fields of the recipe's bench section; `needs`: export targets that are measured.
ENGINES = by_name(
    Row("torch", (), refuse_torch, "bipdeploy.measuring.torch_bench:run"),
    Row("onnx", ("onnx",), None, "bipdeploy.measuring.onnx_bench:run"),
    Row("vllm", (), refuse_vllm, "bipdeploy.measuring.vllm_bench:run"),
)
