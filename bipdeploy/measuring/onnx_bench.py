"""Latency in ONNX Runtime: dense, pruned and quantised, interleaved with the same in PyTorch."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bipdeploy.measuring import torch_bench
from bipdeploy.measuring.timing import interleaved, speedup
from bipdeploy.model import loading
from bipdeploy.model.blocks import compute_dtype
from bipdeploy.ort import folder as onnx_folder
from bipdeploy.ort.folder import onnx_folders
from bipdeploy.ort.runtime import OnnxModel
from bipdeploy.ort.session import device_of
from bipdeploy.planning.job import Job
from bipdeploy.recipe.figures import VERSUS_TORCH

MEASURES = ("prefill", "decode", "ttft")
PAUSE = 0.05  # seconds; the threads of the session that ran before still spin for a moment
DENSE, TORCH = "onnx dense", "torch pruned"


def run(job: Job) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures and details. The dense model is exported in the same style and type for it."""
    section, device = job.recipe.bench.onnx, device_of(job.recipe)
    dense = job.dense.checkpoint
    dtype = compute_dtype(job.recipe.model, dense.config, device)
    written = onnx_folders(job.inputs["export"])
    contents = onnx_folder.read(written["onnx"])
    generator = torch.Generator().manual_seed(job.recipe.seed)
    ids = torch.randint(job.dense.architecture.vocabulary, (section.batch, section.prompt_tokens),
                        generator=generator)
    job.reporter.total(section.warmup + section.repeats, "rounds")
    with tempfile.TemporaryDirectory(dir=job.out, prefix=".dense-") as place:
        whole = Path(place) / "dense"
        onnx_folder.write(dense, whole, style=contents.style, dtype=contents.dtype)
        models = {DENSE: OnnxModel(whole, device.type),
                  **{prefix: OnnxModel(folder, device.type) for prefix, folder in written.items()}}
        runs = {name: partial(rested, generate, model, ids, section.new_tokens)
                for name, model in models.items()}
        runs[TORCH] = partial(rested, torch_bench.generation(
            loading.load_model(job.inputs["exported"], dtype, device), ids.to(device),
            section.new_tokens))
        times = interleaved(runs, section.repeats, section.warmup, job.reporter.advance)
    figures: dict[str, float] = {}
    spread: dict[str, Any] = {}
    for prefix in written:
        found, details = torch_bench.summarise({"dense": times[DENSE], "pruned": times[prefix]},
                                               section)
        figures |= {f"{prefix}.{name}": value for name, value in found.items()}
        spread |= {f"{prefix}.{name}": value for name, value in details["spread"].items()}
        for measure in MEASURES:
            gain = speedup(times[TORCH][measure], times[prefix][measure])
            figures[f"{prefix}.{measure}.{VERSUS_TORCH}"] = gain.median
            spread[f"{prefix}.{measure}.{VERSUS_TORCH}"] = gain.as_dict()
    return figures, {
        "device": str(device), "style": contents.style, "dtype": contents.dtype,
        "torch_dtype": str(dtype), "threads": torch.get_num_threads(), "batch": section.batch,
        "prompt_tokens": section.prompt_tokens, "new_tokens": section.new_tokens,
        "repeats": section.repeats, "spread": spread}


def rested(measure: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """A measurement after a pause, so that it has the cores to itself."""
    time.sleep(PAUSE)
    return measure(*arguments)


def generate(model: OnnxModel, ids: torch.Tensor, new_tokens: int) -> dict[str, float]:
    """Seconds of one greedy generation for ids [B, T], measured as `torch_bench.generate` does."""
    began = time.perf_counter()
    logits, cache = model.prefill(ids, room=new_tokens - 1)
    prefilled = time.perf_counter()
    token = logits.argmax(-1)
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        token = model.step(token, cache).argmax(-1)
    ended = time.perf_counter()
    return {"prefill": prefilled - began, "ttft": first - began,
            "decode": (ended - first) / (new_tokens - 1)}
