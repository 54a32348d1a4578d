"""What the commands show at their end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from bipdeploy import console, summary
from bipdeploy.comparing import results
from bipdeploy.comparing.command import Compared
from bipdeploy.pipeline import RunResult
from bipdeploy.plan import Plan, Verdict, described
from bipdeploy.summary import Row


def show_run(result: RunResult) -> None:
    """The comparison, the gates, and the paths of what was made."""
    if result.reused:
        console.err.print(f"reused, nothing changed: {', '.join(result.reused)}")
    folders = {name: result.folder / name for name in result.stages}
    show_comparison(folders)
    collected = summary.collect(folders)
    if collected["lora_said"]:
        console.out.print(collected["lora_said"] + "\n", markup=False)
    gates = collected["gates"]
    if gates and gates["gates"]:
        show_gates(gates["gates"])
    for label, path in (("model", "export/transformers"), ("report", "report/report.html"),
                        ("manifest", "manifest.json")):
        if path.split("/")[0] in folders or path == "manifest.json":
            console.out.print(f"{label:<9} {result.folder / path}", markup=False)


def show_comparison(folders: Mapping[str, Path]) -> None:
    """Dense against pruned, as a table on stdout."""
    rows = summary.collect(folders)["rows"]
    if rows:
        _show_rows(rows, ("dense", "pruned", "pruned / dense", "quartiles"))


def _show_rows(rows: Sequence[Row], titles: Sequence[str]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right")
    for row in rows:
        cells = (row.dense, row.pruned, row.change, row.spread)
        table.add_row(row.label, *cells[:len(titles)])
    console.out.print(table)
    console.out.print()


WIDTH = 120  # columns that a table may take before it is split, where stdout is no terminal


def show_compared(compared: Compared) -> None:
    """The table of a comparison, one per ratio where it would be too wide, and its page."""
    summary = results.main(compared.data["summary"]) if compared.data["summary"] else []
    if summary:
        text, window = summary[0]["text"], summary[0]["window"]
        dense = compared.data["dense"]["perplexity"][text][window]["perplexity"]
        console.out.print(f"perplexity on {text}\nwindow {window}, dense {results.shown(dense)}; "
                          "mean over seeds ± largest distance from it\n", markup=False)
    ratios = results.ratios_in(summary)
    whole = results.table(summary, ratios)
    limit = console.out.width if console.out.is_terminal else WIDTH
    tables = ([whole] if _width(whole) <= limit else
              [results.table(summary, [ratio]) for ratio in ratios])
    for heading, *rows in tables if summary else []:
        # Its own width: where stdout is no terminal, rich would cut cells off at 80 columns.
        table = Table(box=None, pad_edge=False, header_style="bold",
                      width=_width([heading, *rows]) - 2)
        for number, title in enumerate(heading):
            table.add_column(title, justify="right" if number else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.out.print(table)
        console.out.print()
    console.out.print(f"measured {compared.measured}, reused {compared.reused}; "
                      f"{compared.folder / 'compare.md'}", markup=False)


def _width(rows: Sequence[Sequence[str]]) -> int:
    return sum(max(map(len, column)) + 2 for column in zip(*rows, strict=True))


def show_plan(plan: Plan) -> None:
    """Sizes, widths by block, and whether these divide."""
    _show_rows(summary.rows(plan.figures, {}), ("dense", "pruned", "pruned / dense"))
    blocks = {"dense": plan.dense, "pruned": plan.pruned}
    if plan.known == "budget":
        console.out.print("Widths depend on scores: they are known once score and prune have run. "
                          "Until then\nthe sizes are those of uniform widths at the same budget.\n")
        if any(plan.dropped.values()):
            console.out.print("So does which parts are dropped. The first unprotected ones stand "
                              "in for them here.\n")
        blocks["uniform"] = blocks.pop("pruned")
    for label, widths in blocks.items():
        for number, line in enumerate(described(widths)):
            console.out.print(f"{'' if number else label:<8} {line}", markup=False)
    console.out.print()
    longest = max(len(verdict.requirement) for verdict in plan.verdicts)
    for verdict in plan.verdicts:
        console.out.print(f"{verdict.requirement:<{longest}}  {_verdict(verdict)}")


def _verdict(verdict: Verdict) -> str:
    if verdict.divides is None:
        return "not known before scoring"
    if verdict.divides:
        return "[green]divides[/]"
    count = len(verdict.faults)
    rest = f" ({count} in all)" if count > 2 else ""
    return f"[red]breaks[/]: {', '.join(verdict.faults[:2])}{rest}"


def show_gates(verdicts: Sequence[Mapping[str, Any]]) -> None:
    """One line per gate."""
    for verdict in verdicts:
        word = "[green]passed[/]" if verdict["passed"] else "[red]FAILED[/]"
        console.out.print(f"{word}  {verdict['figure']} {verdict['why']}")
    console.out.print()


def show_stream(pieces: Iterable[str]) -> None:
    """Text on stdout as it is made."""
    for piece in pieces:
        console.out.print(piece, end="", markup=False)
        console.out.file.flush()
    console.out.print()


def show_side_by_side(streams: Mapping[str, Iterable[str]]) -> None:
    """Several texts in columns, one after the other; where stdout is no terminal, as paragraphs."""
    made = dict.fromkeys(streams, "")

    def table() -> Table:
        columns = Table(box=None, expand=True, padding=(0, 2, 0, 0), header_style="bold")
        for name in made:
            columns.add_column(name, ratio=1)
        columns.add_row(*(Text(text) for text in made.values()))
        return columns

    if not console.out.is_terminal:
        for name, pieces in streams.items():
            console.out.print(f"{name}: {''.join(pieces)}", markup=False)
        return
    with Live(table(), console=console.out, auto_refresh=False) as live:
        for name, pieces in streams.items():
            for piece in pieces:
                made[name] += piece
                live.update(table(), refresh=True)
