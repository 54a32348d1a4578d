"""What a run on a CPU will take, said before it starts. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bipdeploy.planning import cpu_peak, footprint
from bipdeploy.planning.resolved import Resolved
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.running import machine

WORTH_SAYING, LONG = 600, 3600  # seconds: of a run, of a stage
_NOMINAL = {"flops": 1e11, "bandwidth": 1e10}  # a slow CPU's: below that nothing is measured


def notes(resolved: Resolved, due: Sequence[str]) -> list[str]:
    """A line with the time of the stages that will run, and one for each that is long, with what
    makes it shorter. None where a GPU computes, or where it is soon done."""
    device = resolved.recipe.model.device
    if device == "cuda" or (device == "auto" and machine.hardware()["gpus"]):
        return []
    if sum(_seconds(resolved, due, _NOMINAL).values()) < WORTH_SAYING:
        return []
    return said(_seconds(resolved, due, cpu_peak.measured()), resolved.recipe)


def said(seconds: Mapping[str, float], recipe: Recipe) -> list[str]:
    """The lines for stages of so many seconds."""
    whole = sum(seconds.values())
    if whole < WORTH_SAYING:
        return []
    longest = sorted(seconds, key=lambda name: -seconds[name])[:3]
    lines = [f"on this CPU the run takes at least {_time(whole)}: "
             + ", ".join(f"{name} {_time(seconds[name])}" for name in longest)
             + "; loading and zero-shot tasks come on top"]
    return lines + [f"{name} takes over an hour: {cheaper(name, recipe)}"
                    for name in longest if seconds[name] > LONG]


def cheaper(stage: str, recipe: Recipe) -> str:
    """What makes a stage take less time, by what the recipe asks of it."""
    fewer = "lower calibration.samples"
    search = recipe.prune.search
    return {
        "score": "score.propagation: bound needs no pass for each head" if
        recipe.score.propagation == "measured" else fewer,
        "curves": "prune.search.propagation: sensitivity grows with the blocks, not their square" if
        search.propagation == "measured" else
        f"lower prune.search.windows or prune.search.points, or {fewer}",
        "prune": "lower prune.learned.steps, batch or tokens" if
        recipe.prune.layers == "learned" else
        "lower prune.search.generations, offspring or windows" if
        recipe.prune.layers == "evolved" else
        "prune.search.rounds: 1 takes one search, and none here",
        "recover": "recover.refit.ridge: 0.1 solves once where auto solves for every ridge that "
        "it tries" if recipe.recover.refit.ridge == "auto" else fewer,
        "tune": "lower tune.steps, tune.batch or tune.tokens",
        "evaluate": "lower evaluate.perplexity.max_tokens, or name fewer windows",
        "bench": "lower bench.torch.repeats, prompt_tokens or new_tokens",
    }.get(stage, "switch off what is not needed")


def _seconds(resolved: Resolved, due: Sequence[str], peak: Mapping[str, float]) -> dict[str, float]:
    sized = footprint.sizes(resolved, resolved.exported(resolved.uniform))
    found = footprint.seconds(sized, peak["flops"], peak["bandwidth"])
    return {name: found[name] or 0.0 for name in due}


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= LONG else f"{seconds / 60:.0f} min"
