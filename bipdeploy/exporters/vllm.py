"""Target `vllm`: a folder that vLLM serves, tried in every engine that is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bipdeploy.errors import InputError, StageError
from bipdeploy.exporters import portability
from bipdeploy.model import routes
from bipdeploy.model.blocks import compute_device, compute_dtype
from bipdeploy.model.checkpoint import Checkpoint, CheckpointWriter
from bipdeploy.model.families import Architecture
from bipdeploy.model.folder import add_code, copy_checkpoint, require_own_code
from bipdeploy.model.formats import ZERO_ATTENTION, is_per_block, vllm_config
from bipdeploy.model.routes import ROUTES
from bipdeploy.planning.job import Job
from bipdeploy.reporting.card import model_card
from bipdeploy.running.machine import release_memory
from bipdeploy.serving import engine as engines
from bipdeploy.serving.engine import Engine


def export(job: Job, out: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Write the folder, then load it in every engine. Raises StageError where transformers, which
    is always here, does not agree with the sliced model; what vLLM does is recorded, and the
    figure `vllm.verified` is 1 where every way that was tried works."""
    source = Checkpoint(job.inputs["pruned"])
    require_own_code(source.config, trusted=job.recipe.model.trust_remote_code)
    write(source, out, job.recipe.hardware.tensor_parallel)
    config = Checkpoint(out).config
    per_block = is_per_block(config)
    results = verify_all(job, source, out, per_block)
    for name, result in results.items():
        if result["status"] == routes.FAILED:
            if ROUTES[name].engine == "transformers":
                raise StageError(f"the exported model does not work in transformers "
                                 f"({ROUTES[name].how}): {result['why']}")
            job.reporter.note(f"vLLM ({ROUTES[name].how}) failed: {result['why']}")
    (out / "README.md").write_text(model_card(
        Checkpoint(out), job.recipe if "prune" in job.inputs else None, results))
    tried = {result["status"] for name, result in results.items() if ROUTES[name].engine == "vllm"}
    verified = float(routes.VERIFIED in tried and routes.FAILED not in tried)
    return {"vllm.verified": verified}, {
        "architecture": config["architectures"][0], "portability": results,
        "needs": "bipdeploy installed, or --trust-remote-code" if per_block
        else "nothing besides vLLM"}


def write(source: Checkpoint, out: Path, tensor_parallel: int) -> None:
    """The checkpoint in the form that both of vLLM's ways can load.

    vLLM's Transformers backend needs an attention in every block. One that was removed is written
    as `tensor_parallel` heads with zero weights, which add exactly nothing; our plugin knows them
    by the list in the configuration, and keeps no KV cache for them.
    """
    arch = source.architecture
    config = vllm_config(source.config, arch, tensor_parallel)
    if config == source.config:
        copy_checkpoint(source, out)
    else:
        dtype = source.entry(source.outside_blocks()[0]).dtype
        removed = config.get(ZERO_ATTENTION, [])
        with CheckpointWriter(out, config, source.folder) as writer:
            writer.add_outside_blocks(source)
            for index in range(len(arch.blocks)):
                writer.add(source.block(index), f"model.layers.{index}.")
                if index in removed:
                    writer.add(zero_attention(arch, tensor_parallel, dtype),
                               f"model.layers.{index}.")
    if is_per_block(config):
        add_code(out)


def zero_attention(arch: Architecture, heads: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """An attention of one KV head and `heads` query heads that adds zero, by tensor name."""
    rows = {"q": heads * arch.head_dim, "k": arch.head_dim, "v": arch.head_dim}
    tensors = {f"self_attn.{p}_proj.weight": torch.zeros(n, arch.hidden) for p, n in rows.items()}
    tensors["self_attn.o_proj.weight"] = torch.zeros(arch.hidden, rows["q"])
    if arch.qkv_bias:
        tensors |= {f"self_attn.{p}_proj.bias": torch.zeros(n) for p, n in rows.items()}
    if arch.output_bias:
        tensors["self_attn.o_proj.bias"] = torch.zeros(arch.hidden)
    if arch.family.qk_norm:
        tensors |= {f"self_attn.{p}_norm.weight": torch.ones(arch.head_dim) for p in "qk"}
    tensors["input_layernorm.weight"] = torch.ones(arch.hidden)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def compared_in(job: Job, source: Checkpoint) -> str:
    """The recipe's type of the comparison, with `auto` decided."""
    model, device = job.recipe.model, compute_device(job.recipe.model)
    if job.recipe.export.vllm.dtype != "auto":
        return str(job.recipe.export.vllm.dtype)
    if device.type == "cpu":
        return "float32"
    return str(compute_dtype(model, source.config, device)).removeprefix("torch.")


def verify_all(job: Job, source: Checkpoint, out: Path, per_block: bool) -> dict[str, Any]:
    """The result of every route, in the order of the table."""
    release_memory()
    section, arch = job.recipe.export.vllm, source.architecture
    question = portability.draw_question(arch, job.recipe.seed, section.prompts,
                                         section.new_tokens, compared_in(job, source),
                                         str(compute_device(job.recipe.model)))
    reference = portability.reference(source.folder, question)
    engine, missing = _engine(arch)
    split = job.recipe.hardware.tensor_parallel
    if engine and engine.devices < split:
        job.reporter.note(f"vLLM is tried on one device: hardware.tensor_parallel is {split}, and "
                          f"here are {engine.devices}")
        split = 1
    results: dict[str, Any] = {}
    for name, route in ROUTES.items():
        why = routes.inapplicable(name, per_block)
        if why or (missing and route.engine == "vllm"):
            results[name] = routes.not_run(why or missing)
        else:
            results[name] = portability.verify(name, out, question, reference, engine, split)
    return results


def _engine(arch: Architecture) -> tuple[Engine | None, str]:
    """The installed vLLM, or why there is none for this model."""
    try:
        engine = engines.find()
        engine.refuse(arch)
        return engine, ""
    except InputError as error:
        return None, str(error)

