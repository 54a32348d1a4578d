"""What is refused before the first expensive step. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bipdeploy import latency, sources, targets, tasks
from bipdeploy.allocation import narrowest
from bipdeploy.checkpoint import Checkpoint, read_config
from bipdeploy.data import text
from bipdeploy.errors import InputError
from bipdeploy.families import architecture
from bipdeploy.ort import installed
from bipdeploy.recipe import Recipe
from bipdeploy.recipe_target import ShapeSection


def preflight(recipe: Recipe, config: Mapping[str, Any], *, here: bool = True) -> None:
    """Refuse what cannot work before the first expensive step. Raises InputError.

    `here` is False where nothing will run: what is installed on this machine plays no part then.
    """
    arch = architecture(config)
    if recipe.model.shape:
        _same_shape(config, recipe.model.shape)
    key = targets.table_key(recipe, config)
    if key and not latency.lookup(key):  # judged once the times are measured
        narrowest(arch, recipe.prune, tensor_parallel=recipe.hardware.tensor_parallel)
    else:
        targets.planned(recipe, config)
    if recipe.calibration.tokens > arch.max_positions:
        raise InputError(f"calibration.tokens: {recipe.calibration.tokens} is longer than the "
                         f"model's maximum of {arch.max_positions}; lower it")
    if recipe.lora.enabled and recipe.lora.tokens > arch.max_positions:
        raise InputError(f"lora.tokens: {recipe.lora.tokens} is longer than the model's maximum of "
                         f"{arch.max_positions}; lower it")
    check_texts(recipe)
    if here:
        check_tasks(recipe)
    perplexity, bench = recipe.evaluate.perplexity, recipe.bench.torch
    if perplexity.enabled:
        for window in perplexity.windows:
            if isinstance(window, int) and window > arch.max_positions:
                raise InputError(f"evaluate.perplexity.windows: {window} is longer than the "
                                 f"model's maximum of {arch.max_positions}; lower it or write max")
    if recipe.export.onnx.enabled:
        if here:
            installed.require(*installed.PACKAGES)
        if recipe.export.onnx.dtype == "bfloat16" and recipe.model.device == "cpu":
            raise InputError("export.onnx.dtype: onnxruntime has no bfloat16 on a CPU, and "
                             "model.device is cpu; use float32 or float16")
    vllm = recipe.bench.vllm
    if vllm.enabled and vllm.prompt_tokens + vllm.new_tokens >= arch.max_positions:
        raise InputError(f"bench.vllm: prompt_tokens {vllm.prompt_tokens} and new_tokens "
                         f"{vllm.new_tokens} do not leave one token of the model's maximum of "
                         f"{arch.max_positions}; lower them")
    if bench.enabled and bench.prompt_tokens + bench.new_tokens > arch.max_positions:
        raise InputError(f"bench.torch: prompt_tokens {bench.prompt_tokens} and new_tokens "
                         f"{bench.new_tokens} pass the model's maximum of {arch.max_positions}; "
                         "lower them")


def _same_shape(config: Mapping[str, Any], shape: ShapeSection) -> None:
    found, stated = architecture(config), architecture(shape.config)
    for name, mine, real in (
            ("model_type", stated.family.model_type, found.family.model_type),
            *((n, getattr(stated, n), getattr(found, n))
              for n in ("hidden", "head_dim", "vocabulary", "tied", "max_positions")),
            ("blocks", len(stated.blocks), len(found.blocks)),
            *((n, getattr(stated.blocks[0], n), getattr(found.blocks[0], n))
              for n in ("heads", "kv_heads", "intermediate"))):
        if mine != real:
            raise InputError(f"model.shape.{name}: {mine} is not what the model's config.json "
                             f"says, {real}; correct it, or leave model.shape out")


def check_texts(recipe: Recipe) -> None:
    """Refuse texts that are neither known by name nor files here. Raises InputError for all."""
    named = {"calibration.data": recipe.calibration.data}
    if recipe.evaluate.perplexity.enabled:
        named["evaluate.perplexity.data"] = recipe.evaluate.perplexity.data
    if recipe.lora.enabled:
        named["lora.data"] = recipe.lora.data
    listed = [*named.items(), *(("compare.data", data) for data in recipe.compare.data)]
    faults = [f"{name}: {fault}" for name, data in listed if (fault := text.check(data))]
    lora = recipe.lora
    if lora.enabled and lora.format == "alpaca" and text.is_running_text(lora.data):
        faults.append(f"lora.data: {lora.data} has no columns, which lora.format alpaca reads; "
                      "give a .jsonl or .parquet file that has, or alpaca")
    if faults:
        raise InputError("\n".join(faults))


def check_tasks(recipe: Recipe) -> None:
    """Refuse tasks that lm-eval, as installed here, cannot run. Raises InputError for all."""
    if recipe.evaluate.zero_shot.enabled:
        tasks.find(recipe.evaluate.zero_shot.tasks)


def check_offline(recipe: Recipe) -> None:
    """All of `preflight` that needs no network: a model on the hub is not looked at."""
    if sources.is_local(recipe.model.id):
        dense = sources.model_folder(recipe.model.id)
        preflight(recipe, read_config(dense))
        Checkpoint(dense).verify()
    else:
        check_texts(recipe)
        check_tasks(recipe)
