"""Measurements in ONNX Runtime and vLLM, of checkpoints written for it and then removed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bipdeploy.errors import InputError
from bipdeploy.measuring import onnx_bench, vllm_bench
from bipdeploy.measuring.timing import Spread, interleaved, speedup
from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.ort import folder as onnx_folder
from bipdeploy.ort import installed, session
from bipdeploy.ort.runtime import OnnxModel
from bipdeploy.planning.job import Job
from bipdeploy.recipe import file as recipe_file
from bipdeploy.running.machine import release_memory
from bipdeploy.serving import engine as engines
from bipdeploy.serving import server
from speed.cases import GIB, Case, Sizes
from speed.models import random_checkpoint

VLLM_NEW = 64  # tokens generated for each request
VLLM_REQUESTS = 64


def onnx(case: Case, sizes: Sizes, device: torch.device, place: Path | None) -> dict[str, Any]:
    """Prefill and decode in ONNX Runtime. Raises InputError where it is not there for the device.
    """
    installed.require(*installed.PACKAGES)
    if device.type == "cuda" and (why := session.no_cuda()):
        raise InputError(why)
    with _folder(case, sizes, place, copies=3) as work:
        models = {}
        for which, removed in (("dense", 0), ("pruned", case.removed)):
            checkpoint = random_checkpoint(work / "checkpoint", case.config(removed, sizes), device)
            onnx_folder.write(Checkpoint(checkpoint), work / which, style="gqa", dtype=sizes.dtype)
            shutil.rmtree(checkpoint)
            models[which] = OnnxModel(work / which, device.type)
        release_memory()
        ids = torch.randint(models["dense"].contents.vocabulary, (case.batch, case.context),
                            generator=torch.Generator().manual_seed(0))
        runs = {which: partial(onnx_bench.rested, onnx_bench.generate, model, ids, sizes.new + 1)
                for which, model in models.items()}
        times = interleaved(runs, sizes.rounds, 1)
    found = {"ideal_speedup": case.ideal(sizes)}
    for phase in ("prefill", "decode"):
        dense, pruned = times["dense"][phase], times["pruned"][phase]
        found[phase] = {"seconds": {"dense": Spread.of(dense).as_dict(),
                                    "pruned": Spread.of(pruned).as_dict()},
                        "speedup": speedup(dense, pruned).as_dict()}
    return found


def vllm(case: Case, sizes: Sizes, device: torch.device, place: Path | None) -> dict[str, Any]:
    """Servers of both models up at once, at 1, 8 and 64 requests in flight. Raises InputError where
    vLLM is not there for the device."""
    recipe = recipe_file.build(
        {"name": "speed", "model": {"id": "dense", "device": device.type, "dtype": sizes.dtype},
         "prune": {"ratio": case.removed / 100},
         "bench": {"vllm": {"concurrency": [1, 8, 64], "rounds": sizes.slow_rounds,
                            "prompt_tokens": case.context, "requests": VLLM_REQUESTS,
                            "new_tokens": VLLM_NEW}}}, "the benchmark's recipe")
    engine = engines.find()
    if engine.device != device.type:
        raise InputError(f"{engine} is installed, and this is measured on {device.type.upper()}")
    with _folder(case, sizes, place, copies=2) as work:
        folders = {which: random_checkpoint(work / which, case.config(removed, sizes), device)
                   for which, removed in (("dense", 0), ("pruned", case.removed))}
        release_memory()
        measurement = vllm_bench.Measurement(
            Job(recipe, {}, work), engine, folders,
            {which: server.checked(folder, engine) for which, folder in folders.items()})
        measurement.serve()
    return {"engine": str(engine), "options": measurement.options,
            "figures": measurement.figures, "spread": measurement.spread}


@contextmanager
def _folder(case: Case, sizes: Sizes, place: Path | None, copies: int) -> Iterator[Path]:
    """A temporary folder with room for so many copies of the dense model, in `place`."""
    with tempfile.TemporaryDirectory(prefix="speed-", dir=place) as folder:
        needed = copies * case.sizes_of(sizes)[0].parameters() * sizes.value
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(f"needs {needed / GIB:.1f} GiB of disk, {free / GIB:.1f} are free in "
                             f"{Path(folder).parent}; give another folder with --work")
        yield Path(folder)
