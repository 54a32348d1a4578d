"""A comparison from its recipe to its files. Loads torch only where something is to be measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bipdeploy.comparing import cells, plot, records, results
from bipdeploy.pipeline.keys import local_texts, plain
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.running import artifacts, machine, places
from bipdeploy.running.reporter import Reporter

DATA, TABLE, PAGE, PICTURE = "compare.json", "compare.csv", "compare.md", "compare.png"


@dataclass(frozen=True)
class Compared:
    """A comparison's folder, what `compare.json` in it holds, and how many cells are new."""

    folder: Path
    data: dict[str, Any]
    measured: int
    reused: int


def compare(recipe: Recipe, out: Path, reporter: Reporter, command: str,
            said: Callable[[str], None] = lambda _: None) -> Compared:
    """Measure what the recipe's section `compare` asks for, then write tables and the plot.

    Cells whose records are in `out` are not measured again; tables show every record there that
    holds for this recipe, model and code. Raises InputError before anything is measured.
    """
    wanted = cells.plan(recipe)
    places.require_apart(out, [wanted.dense, *local_texts(recipe)], holding=False)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise artifacts.unwritable(out, error) from error
    records.sweep(out)
    keys = {cells.key(wanted, cell) for cell in wanted.cells}
    known = {record["key"] for record in records.read(out)}
    dense = out / f"dense-{cells.dense_key(wanted)[:16]}.json"
    count, failed = 0, {}
    if keys - known or not dense.is_file():
        from bipdeploy.comparing import run

        meter = run.Meter(wanted, out, reporter)
        meter.of_dense()
        done = run.measure(wanted, meter, out, reporter, said)
        count, failed = done.count, done.failed
    data = _data(wanted, out, artifacts.read_json(dense), command, failed)
    _write(out, data)
    return Compared(out, data, count, len(keys & known))


def _data(wanted: cells.Plan, out: Path, dense: dict[str, Any], command: str,
          failed: dict[cells.Cell, str]) -> dict[str, Any]:
    held = cells.current(wanted, records.read(out))
    figures = {name: value for name, value in dense.items() if name not in ("test", "answers")}
    return {"command": command, "model": wanted.recipe.model.id,
            "environment": machine.environment(), "recipe": plain(wanted.recipe),
            "test": dense["test"], "dense": figures,
            "summary": results.summarise(held, dense),
            "not_run": [{"cell": f"seed {c.seed}, {c.method} at {c.ratio:.0%}, {c.repair}",
                         "why": why} for c, why in failed.items()],
            "records": held}


def _write(out: Path, data: dict[str, Any]) -> None:
    artifacts.write_json(out / DATA, data)
    summary = data["summary"]
    try:
        (out / PAGE).write_text(results.markdown(data), encoding="utf-8")
        (out / TABLE).write_text(results.as_csv(summary), encoding="utf-8")
        if summary:
            first = results.main(summary)
            at = data["dense"]["perplexity"][first[0]["text"]][first[0]["window"]]
            (out / PICTURE).write_bytes(plot.draw(first, at["perplexity"]))
    except OSError as error:
        raise artifacts.unwritable(out, error) from error
