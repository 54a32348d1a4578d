"""Stage `export`: write and verify every enabled target."""

from __future__ import annotations

from typing import Any

from bipdeploy.exporters.table import EXPORTERS
from bipdeploy.planning.job import Job


def run(job: Job) -> None:
    """Write one folder per enabled target, `export.json` with what was verified, and figures."""
    enabled = [name for name in EXPORTERS if getattr(job.recipe.export, name).enabled]
    job.reporter.total(len(enabled), "targets")
    record: dict[str, Any] = {}
    figures: dict[str, float] = {}
    for name in EXPORTERS:
        if name in enabled:
            found, record[name] = EXPORTERS[name].load()(job, job.out / name)
            figures |= found
            job.reporter.advance()
        else:
            record[name] = {"not_run": f"export.{name}.enabled is false"}
    job.write("export.json", record)
    job.write_figures(figures)
