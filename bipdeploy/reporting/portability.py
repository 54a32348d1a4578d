"""What an export found out about who loads it, as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bipdeploy.model.routes import ROUTES, VERIFIED, not_run


def of_export(record: Mapping[str, Any]) -> dict[str, Any]:
    """The results of every route in an `export.json`, also where `vllm` was not written."""
    written = record.get("vllm", {})
    if "portability" in written:
        return written["portability"]
    results = {name: not_run(written.get("not_run", "export.vllm is not part of this export"))
               for name in ROUTES}
    checked = record.get("transformers", {})
    if "verified" in checked:
        name = ("transformers.bipdeploy" if checked["architecture"].startswith("Bipdeploy")
                else "transformers.stock")
        results[name] = {"status": VERIFIED, "why": None}
    return results


def table(portability: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """(engine, how, result) for every route, to be read by people."""
    rows = []
    for name, route in ROUTES.items():
        entry = portability.get(name, not_run("not asked for"))
        said = entry["status"]
        if entry["status"] == VERIFIED and "equal_tokens" in entry:
            said += (f": {entry['equal_tokens']} of {entry['prompts']} prompts continue with the "
                     "same tokens, log-probabilities within "
                     f"{entry['largest_logprob_difference']:.1g}")
        elif entry.get("why"):
            said += f": {entry['why']}"
        rows.append((route.title, route.how, said))
    return rows
