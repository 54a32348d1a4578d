"""Stage `export`: write and verify every enabled target."""

from __future__ import annotations

from bipdeploy.exporters import EXPORTERS
from bipdeploy.stages.job import Job


def run(job: Job) -> None:
    """Write one folder per enabled target, and `export.json` with what was verified.

    The figure `vllm.verified` is 1 where vLLM loads the folder in every way that was tried.
    """
    enabled = [name for name in EXPORTERS if getattr(job.recipe.export, name).enabled]
    job.reporter.total(len(enabled), "targets")
    record = {}
    for name in EXPORTERS:
        if name in enabled:
            record[name] = EXPORTERS[name].load()(job, job.out / name)
            job.reporter.advance()
        else:
            record[name] = {"not_run": f"export.{name}.enabled is false"}
    job.write("export.json", record)
    if "portability" in record["vllm"]:
        tried = [result["status"] for name, result in record["vllm"]["portability"].items()
                 if name.startswith("vllm.")]
        job.write_figures({"vllm.verified": float("verified" in tried and "failed" not in tried)})
