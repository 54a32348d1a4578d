"""Stage `bench`: the exported model beside the dense one, one engine per entry of `ENGINES`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bipdeploy.measuring import torch_bench, vllm_bench
from bipdeploy.stages.job import Job

# Keys are the fields of the recipe's bench section.
ENGINES: dict[str, Callable[[Job], tuple[dict[str, float], dict[str, Any]]]] = {
    "torch": torch_bench.run,
    "vllm": vllm_bench.run,
}


def run(job: Job) -> None:
    """Write `bench.json` and the speed figures of every enabled engine."""
    record: dict[str, Any] = {}
    figures: dict[str, float] = {}
    for name, engine in ENGINES.items():
        if getattr(job.recipe.bench, name).enabled:
            measured, record[name] = engine(job)
            figures |= measured
        else:
            record[name] = {"not_run": f"bench.{name}.enabled is false"}
    job.write("bench.json", record)
    job.write_figures(figures)
