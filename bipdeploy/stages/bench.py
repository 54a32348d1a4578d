"""Stage `bench`: the exported model beside the dense one, one engine per entry of `ENGINES`."""

from __future__ import annotations

import importlib
from typing import Any

from bipdeploy.stages.job import Job

# Keys are the fields of the recipe's bench section; each module below bipdeploy.measuring has a
# function `run(job) -> (figures, details)`.
ENGINES = {"torch": "torch_bench", "onnx": "onnx_bench", "vllm": "vllm_bench"}


def run(job: Job) -> None:
    """Write `bench.json` and the speed figures of every enabled engine."""
    record: dict[str, Any] = {}
    figures: dict[str, float] = {}
    for name, module in ENGINES.items():
        if getattr(job.recipe.bench, name).enabled:
            engine = importlib.import_module(f"bipdeploy.measuring.{module}")
            measured, record[name] = engine.run(job)
            figures |= measured
        else:
            record[name] = {"not_run": f"bench.{name}.enabled is false"}
    job.write("bench.json", record)
    job.write_figures(figures)
