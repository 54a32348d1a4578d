"""What scoring, a search and a refit cost, in forward passes over the same windows.

    python benchmarks/search_costs.py --growth --out benchmarks/results/search-growth.json
    python benchmarks/search_costs.py --model FOLDER --text FILE --out costs.json

`--growth`: a search on random LLaMAs of 8, 16 and 32 blocks, by sensitivity and measured. Their
times do not depend on what the weights are. `--model`: all three stages on a real one.

All are run in turns with a plain forward pass, and reported as ratios within rounds, with
quartiles: of seconds by the clock, and of those that all threads computed, which others on the
machine disturb less.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bipdeploy import api
from bipdeploy.data.calibration import calibration_batches
from bipdeploy.measuring.timing import interleaved, speedup
from bipdeploy.model.blocks import BlockWalker
from bipdeploy.planning.job import Job
from bipdeploy.planning.resolved import resolved_at
from bipdeploy.recipe import file as recipe_file
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.running import artifacts, machine
from bipdeploy.running.reporter import Silent
from bipdeploy.stages import curves, recover, score
from speed.models import random_checkpoint
from speed.shapes import SHAPES, config_of
from streaming import forward, timed

BLOCKS = (8, 16, 32)
SHAPE = "30M"
# A fixed ridge, and text enough that the walks' products outweigh the refits' solutions, which cost
# the same however much text there is: the search's own cost is what grows here.
TEXT = ("calibration.samples=32", "calibration.tokens=128", "prune.search.windows=8",
        "prune.search.points=4", "recover.refit.ridge=0.1")


def recipe_of(model: Path, *settings: str) -> Recipe:
    own = recipe_file.build({"name": "costs", "model": {"id": str(model)}}, "--set", [
        "model.device=cpu", "prune.ratio=0.3", "prune.layers=searched", "prune.round_to=64",
        *settings])
    return resolved_at(own, model).recipe


def search(model: Path, recipe: Recipe, scores: Path, propagation: str) -> Callable[[], None]:
    section = recipe.prune.model_copy(update={"search": recipe.prune.search.model_copy(
        update={"propagation": propagation})})
    recipe = recipe.model_copy(update={"prune": section})
    checkpoint, found = BlockWalker(model, recipe.model).checkpoint, score.read_scores(scores)

    def run() -> None:
        with tempfile.TemporaryDirectory() as work:
            curves.measured(recipe, checkpoint, found, Path(work), Silent())

    return run


def refit(model: Path, recipe: Recipe, sliced: Path) -> Callable[[], None]:
    def run() -> None:
        with tempfile.TemporaryDirectory() as work:
            recover.refit(Job(recipe, {"dense": model, "sliced": sliced / "model"}, Path(work)))

    return run


def scoring(model: Path, recipe: Recipe) -> Callable[[], None]:
    walker = BlockWalker(model, recipe.model)
    windows, _ = calibration_batches(recipe, model, walker.architecture.max_positions)
    return lambda: void(score.score_blocks(walker, windows, recipe))


def void(_: object) -> None:
    """Forget a result."""


def compared(runs: dict[str, Callable[[], None]], rounds: int, warmup: int) -> dict[str, Any]:
    """Each in forward passes, and the seconds of each."""
    times = interleaved({name: partial(timed, run) for name, run in runs.items()}, rounds, warmup)
    return {name: {measure: {
        "passes": speedup(own[measure], times["forward"][measure]).as_dict(),
        "rounds": own[measure]} for measure in ("seconds", "cpu_seconds")}
        for name, own in times.items()}


def growth(rounds: int) -> dict[str, Any]:
    """By number of blocks: a forward pass, and a search by either propagation."""
    found = {}
    for count in BLOCKS:
        with tempfile.TemporaryDirectory() as work:
            config = {**config_of(SHAPE), "num_hidden_layers": count}
            model = random_checkpoint(Path(work) / "model", config)
            recipe = recipe_of(model, *TEXT)
            scores = api.score(str(model), Path(work) / "scores", [*TEXT[:2], "model.device=cpu"])
            found[count] = compared({
                "forward": forward(model, recipe),
                **{own: search(model, recipe, scores, own)
                   for own in ("sensitivity", "measured")}}, rounds, 1)
        print(count, {name: round(own["cpu_seconds"]["passes"]["median"], 2)
                      for name, own in found[count].items()}, flush=True)
    return {"shape": {**asdict(SHAPES[SHAPE]), "blocks": BLOCKS}, "settings": TEXT,
            "blocks": found}


def real(model: Path, text: Path, rounds: int) -> dict[str, Any]:
    """Scoring, search and refit of a real model by the defaults, with as much text as the rule
    asks for."""
    settings = [f"calibration.data={text}"]
    recipe = recipe_of(model, *settings)
    with tempfile.TemporaryDirectory() as work:
        own = [*settings, "model.device=cpu", "prune.round_to=64"]
        scores = api.score(str(model), Path(work) / "scores", own)
        sliced = api.prune(str(model), scores, Path(work) / "sliced", 0.3, own)
        return {"windows": recipe.calibration.samples, "tokens": recipe.calibration.tokens,
                "stages": compared({
                    "forward": forward(model, recipe), "score": scoring(model, recipe),
                    "search": search(model, recipe, scores, "sensitivity"),
                    "refit": refit(model, recipe, sliced)}, rounds, 0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if not arguments.growth and not (arguments.model and arguments.text):
        parser.error("give --growth, or --model with --text")
    found = (growth(arguments.rounds) if arguments.growth else
             real(arguments.model, arguments.text, arguments.rounds))
    artifacts.write_json(arguments.out, {
        "environment": machine.environment(), "threads": torch.get_num_threads(), **found})
    for name, own in found.get("stages", {}).items():
        passes = own["cpu_seconds"]["passes"]
        print(f"{name}: {passes['median']:.2f} ({passes['low']:.2f} to {passes['high']:.2f}) "
              "forward passes")


if __name__ == "__main__":
    main()
