"""What the commands show at their end."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from bipdeploy.cli import console
from bipdeploy.comparing import results
from bipdeploy.comparing.command import Compared
from bipdeploy.pipeline.pipeline import RunResult
from bipdeploy.planning import footprint, latency
from bipdeploy.planning.plan import Plan, Verdict, described
from bipdeploy.pruning.divisibility import counted
from bipdeploy.reporting import summary
from bipdeploy.reporting.summary import Row
from bipdeploy.sweeping import results as sweeps
from bipdeploy.sweeping.command import Swept


def show_run(result: RunResult) -> None:
    """The comparison, the gates, and the paths of what was made."""
    if result.reused:
        console.err.print(f"reused, nothing changed: {', '.join(result.reused)}")
    folders = result.folders
    show_comparison(folders)
    collected = summary.collect(folders)
    if collected["tune_said"]:
        console.out.print(collected["tune_said"] + "\n", markup=False)
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
    for rows in tables if summary else []:
        _show_table(rows, range(1, len(rows[0])))
    console.out.print(f"measured {compared.measured}, reused {compared.reused}; "
                      f"{compared.folder / 'compare.md'}", markup=False)


def _show_table(rows: Sequence[Sequence[str]], right: Container[int]) -> None:
    """Rows of text, the first a heading; `right`: numbers of the columns that end flush."""
    # Its own width: where stdout is no terminal, rich would cut cells off at 80 columns.
    table = Table(box=None, pad_edge=False, header_style="bold", width=_width(rows) - 2)
    for number, title in enumerate(rows[0]):
        table.add_column(title, justify="right" if number in right else "left", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    console.out.print(table)
    console.out.print()


def show_swept(swept: Swept) -> None:
    """The trials of a sweep, those on the front, and its page."""
    rows = sweeps.table(swept.data["trials"])
    _show_table(rows, range(1, len(rows[0]) - 2))
    console.out.print(f"{sweeps.BENCHES}\n\nran {swept.ran}, reused {swept.reused}; "
                      f"{swept.folder / 'sweep.md'}", markup=False)


def _width(rows: Sequence[Sequence[str]]) -> int:
    return sum(max(map(len, column)) + 2 for column in zip(*rows, strict=True))


def show_plan(plan: Plan) -> None:
    """Sizes, costs, widths by block, whether these divide, and what a run would take."""
    if plan.source == "shape":
        console.out.print(f"config.json of {plan.model} cannot be had here: the sizes are those of "
                          "model.shape.\n", markup=False)
    _show_rows([*summary.rows(plan.figures, {}), *_cost_rows(plan)],
               ("dense", "pruned", "pruned / dense"))
    if plan.target:
        target = plan.target
        console.out.print(f"target   {target['kind']} {target['asked']:g}, reached "
                          f"{target['reached']:.6g} (counted in {target['unit']})\n", markup=False)
    if plan.note:
        console.note(plan.note)
    blocks = {"dense": plan.dense, "pruned": plan.pruned}
    if plan.known == "unmeasured":
        console.out.print("Widths depend on times of this machine: `bipdeploy profile RECIPE` "
                          "measures them. Until then\nthese are what bytes (decode) or FLOPs "
                          "(prefill) alone ask for.\n", markup=False)
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
    console.out.print()
    _show_speeds(plan)
    _show_stages(plan)


def _cost_rows(plan: Plan) -> list[Row]:
    labels: dict[str, tuple[str, Callable[[float], str]]] = {
        "disk_bytes": ("On disk", summary.as_bytes),
        "kv_cache_bytes": (f"KV cache, {plan.batch} x {plan.context} tokens", summary.as_bytes),
        "prefill_flops_per_token": ("FLOPs/token, prefill", summary.as_count),
        "decode_flops_per_token": ("FLOPs/token, decode", summary.as_count)}
    return [Row(name, label, shown(plan.costs[name]["dense"]), shown(plan.costs[name]["pruned"]),
                f"{plan.costs[name]['pruned'] / plan.costs[name]['dense']:.2f}x", "")
            for name, (label, shown) in labels.items()]


def _show_speeds(plan: Plan) -> None:
    gains = plan.speedups
    console.out.print(f"expected speed-up: {gains['memory_bound']:.2f} where memory bounds it "
                      f"(decode), {gains['compute_bound']:.2f} where compute does (prefill)")
    if plan.gpu and plan.roofline:
        for phase in ("prefill", "decode"):
            bound = plan.roofline[phase]
            console.out.print(f"{phase} on {plan.gpu.name}, at least (roofline): "
                              f"{_ms(bound['dense'])} dense, {_ms(bound['pruned'])} pruned")
        share = plan.roofline["memory"]
        console.out.print(f"weights and cache take {share['dense']:.0%} of its memory dense, "
                          f"{share['pruned']:.0%} pruned ({plan.gpu.source})", markup=False)
    console.out.print()


def _show_stages(plan: Plan) -> None:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("stage, estimates", "writes", "peak memory", "time"):
        shown.add_column(title, justify="left" if title[0] == "s" else "right")
    for name, stage in plan.stages.items():
        seconds = "" if stage.seconds is None else (
            f"{stage.seconds:.2g} s" if stage.seconds < 100 else f"{stage.seconds / 60:.0f} min")
        shown.add_row(name, summary.as_bytes(stage.writes), summary.as_bytes(stage.memory), seconds)
    console.out.print(shown)
    console.out.print(f"\nTimes: work over {plan.machine['name']}; loading and starting come on "
                      f"top. A test text of\nunknown length counts as {footprint.TEST_TOKENS} "
                      "tokens; zero-shot tasks and vLLM are left out.")
    console.out.print(f"text     {plan.text}", markup=False)
    disk = plan.disk
    word = "[red]does not fit[/]: " if disk["needed"] > disk["free"] else ""
    console.out.print(f"disk     {word}{summary.as_bytes(disk['needed'])} needed, "
                      f"{summary.as_bytes(disk['free'])} free")


def show_profile(table: latency.Table) -> None:
    """Seconds of a block's parts by width, and of the rest, in both phases."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "width", *latency.PHASES):
        shown.add_column(title, justify="right" if title else "left")
    phases = [table.phases[phase] for phase in latency.PHASES]
    for part, label in (("heads", "attention of a block, KV heads"),
                        ("queries", "  query heads of each"), ("ffn", "FFN, channels")):
        curves = [curve for phase in phases if (curve := getattr(phase, part))]
        if not curves:
            continue
        for row, width in enumerate(curves[0].widths):
            shown.add_row(label, str(width), *(_ms(curve.seconds[row]) for curve in curves))
    shown.add_row("rest of the model", "", *(_ms(phase.rest) for phase in phases))
    for kind, label in (("median", f"dense, {counted(table.depth, 'block')}"),
                        ("low", "  lower quartile"), ("high", "  upper quartile")):
        shown.add_row(label, "", *(_ms(phase.times["dense"][kind]) for phase in phases))
    console.out.print(shown)
    console.out.print()
    for name, phase in table.phases.items():
        check = phase.check
        console.out.print(
            f"{name}: a model of {check['kv_heads']:.0f} KV heads and {check['intermediate']:.0f} "
            f"channels would take {_ms(check['predicted'])} by this table, and took "
            f"{_ms(check['measured'])}")
    on, key = table.measured_on, table.key
    console.out.print(f"\nbatch {key['batch']}, context {key['context']}, {on['dtype']} on "
                      f"{on['device']}, {counted(on['threads'], 'thread')}, {table.rounds} rounds, "
                      f"{key['hardware']['cpu']}, {on['made']}", markup=False)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


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
