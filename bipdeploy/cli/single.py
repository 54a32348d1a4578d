"""The commands that run one stage on plain paths. Heavy imports stay inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bipdeploy.cli.options import Force, Out, Set
from bipdeploy.errors import GateError

Model = Annotated[str, typer.Argument(help="builtin:pico, a model folder or a hub id.")]
Scores = Annotated[Path, typer.Argument(help="What `bipdeploy score` wrote.")]
Pruned = Annotated[Path, typer.Argument(help="A pruned model: its folder, or a stage's.")]


def score(model: Model, out: Out, settings: Set = None, force: Force = False) -> None:
    """Score every head and FFN channel."""
    _one("score", force, model, out, settings or [])


def curves(model: Model, scores: Scores, out: Out, settings: Set = None,
           force: Force = False) -> None:
    """Measure what each width costs, for all budgets."""
    _one("curves", force, model, scores, out, settings or [])


def prune(model: Model, scores: Scores, out: Out,
          ratio: Annotated[float | None, typer.Option(
              help="Share of block parameters to remove; or --set prune.target=…")] = None,
          curves: Annotated[Path | None, typer.Option(
              help="What `bipdeploy curves` wrote; widths are searched by it.")] = None,
          settings: Set = None, force: Force = False) -> None:
    """Slice a model by its scores."""
    _one("prune", force, model, scores, out, ratio, settings or [], curves=curves)


def recover(model: Model, pruned: Pruned, out: Out, settings: Set = None,
            force: Force = False) -> None:
    """Repair a pruned model beside its dense origin."""
    _one("recover", force, model, pruned, out, settings or [])


def tune(model: Model, pruned: Pruned, out: Out, settings: Set = None,
         force: Force = False) -> None:
    """Train a pruned model on text: adapters that are merged, or all weights."""
    _one("tune", force, model, pruned, out, settings or [])


def export(pruned: Pruned, out: Out, settings: Set = None, force: Force = False) -> None:
    """Write and verify the export targets."""
    _one("export", force, pruned, out, settings or [])


def evaluate(model: Model, pruned: Pruned, out: Out, settings: Set = None,
             force: Force = False) -> None:
    """Measure perplexity and accuracy, dense and pruned."""
    _one("evaluate", force, model, pruned, out, settings or [], table=True)


def bench(model: Model, pruned: Pruned, out: Out, settings: Set = None,
          force: Force = False) -> None:
    """Time the pruned model against the dense one."""
    _one("bench", force, model, pruned, out, settings or [], table=True)


def gate(folders: Annotated[list[Path], typer.Argument(help="Stage folders with figures.")],
         out: Out, settings: Set = None, force: Force = False) -> None:
    """Judge figures by --set gates.FIGURE.max=… and .min=…"""
    from bipdeploy.cli import screens
    from bipdeploy.running import artifacts

    _one("gate", force, folders, out, settings or [])
    verdicts = artifacts.read_json(out / "gates.json")["gates"]
    screens.show_gates(verdicts)
    failed = [v for v in verdicts if not v["passed"]]
    if failed:
        raise GateError("\n".join(f"gate {v['figure']} {v['why']}" for v in failed))


def report(run_folder: Annotated[Path, typer.Argument(help="A run, such as runs/quickstart.")],
           out: Out, force: Force = False) -> None:
    """Write a run's report anew."""
    _one("report", force, run_folder, out)


def _one(name: str, force: bool, *arguments: Any, table: bool = False, **options: Any) -> None:
    """Run one stage by its API function, with a progress bar, then say what it wrote."""
    from bipdeploy import api
    from bipdeploy.cli import console, screens

    with console.bar(name) as bar:
        out = getattr(api, name)(*arguments, reporter=bar, force=force, **options)
    if table:
        screens.show_comparison({name: out})
    console.out.print(f"wrote {out}", markup=False)
