"""Stage `bench`: the exported model beside the dense one, one engine per row of `ENGINES`."""

from __future__ import annotations

from typing import Any

from bipdeploy.measuring.table import ENGINES
from bipdeploy.planning.job import Job


def run(job: Job) -> None:
    """Write `bench.json` and the speed figures of every enabled engine."""
    record: dict[str, Any] = {}
    figures: dict[str, float] = {}
    for name, engine in ENGINES.items():
        if getattr(job.recipe.bench, name).enabled:
            measured, record[name] = engine.load()(job)
            figures |= measured
        else:
            record[name] = {"not_run": f"bench.{name}.enabled is false"}
    job.write("bench.json", record)
    job.write_figures(figures)
