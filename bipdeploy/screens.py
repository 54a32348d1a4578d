"""What the commands show at their end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bipdeploy import console, summary
from bipdeploy.pipeline import RunResult


def show_run(result: RunResult) -> None:
    """The comparison, the gates, and the paths of what was made."""
    if result.reused:
        console.err.print(f"reused, nothing changed: {', '.join(result.reused)}")
    folders = {name: result.folder / name for name in result.stages}
    show_comparison(folders)
    gates = summary.collect(folders)["gates"]
    if gates and gates["gates"]:
        show_gates(gates["gates"])
    for label, path in (("model", "export/transformers"), ("report", "report/report.html"),
                        ("manifest", "manifest.json")):
        if path.split("/")[0] in folders or path == "manifest.json":
            console.out.print(f"{label:<9} {result.folder / path}", markup=False)


def show_comparison(folders: Mapping[str, Path]) -> None:
    """Dense against pruned, as a table on stdout."""
    rows = summary.collect(folders)["rows"]
    if not rows:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for title in ("dense", "pruned", "pruned / dense", "quartiles"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(row.label, row.dense, row.pruned, row.change, row.spread)
    console.out.print(table)
    console.out.print()


def show_gates(verdicts: Sequence[Mapping[str, Any]]) -> None:
    """One line per gate."""
    for verdict in verdicts:
        word = "[green]passed[/]" if verdict["passed"] else "[red]FAILED[/]"
        console.out.print(f"{word}  {verdict['figure']} {verdict['why']}")
    console.out.print()
