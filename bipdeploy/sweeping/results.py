"""What a sweep found: the front of quality against speed, as data and as tables. No torch here."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from bipdeploy.reporting.markdown import as_markdown

Trials = Sequence[Mapping[str, Any]]

QUALITY = "perplexity.ratio"
SPEEDS = {"prefill.speedup": "prefill", "decode.speedup": "decode"}
SIZE = {"parameters.ratio": "parameters"}


def measures(trials: Trials) -> dict[str, str]:
    """What perplexity is weighed against, with short names: speeds, or sizes where none was
    measured."""
    measured = {figure for t in trials for figure in t.get("figures", {})}
    return {f: name for f, name in SPEEDS.items() if f in measured} or SIZE


def front(trials: Trials, figure: str) -> list[str]:
    """Names of the trials that no other beats: not worse in both, and better in one. By quality.

    A `.speedup` is better when higher, any other figure when lower.
    """
    sign = -1 if figure.endswith(".speedup") else 1
    points = {t["name"]: (t["figures"][QUALITY], sign * t["figures"][figure]) for t in trials
              if figure in t.get("figures", {}) and QUALITY in t["figures"]}
    return sorted((name for name, own in points.items() if not any(
        other != own and other[0] <= own[0] and other[1] <= own[1] for other in points.values())),
        key=lambda name: points[name])


def with_fronts(trials: Trials) -> list[dict[str, Any]]:
    """The trials, each with the measures on whose front it is."""
    fronts = {name: front(trials, figure) for figure, name in measures(trials).items()}
    return [{**t, "front": [m for m, names in fronts.items() if t["name"] in names]}
            for t in trials]


def table(trials: Trials) -> list[list[str]]:
    """Rows of text: a heading, then trials, in their order."""
    columns = {QUALITY: "perplexity", **measures(trials), **SIZE}
    return [["trial", *columns.values(), "on the front of", "outcome"],
            *([t["label"], *(_figure(t, figure) for figure in columns),
               ", ".join(t["front"]) or "–", outcome(t)] for t in trials)]


def _figure(trial: Mapping[str, Any], figure: str) -> str:
    value = trial.get("figures", {}).get(figure)
    if value is not None:
        return f"{value:.2f}x" if value < 1e4 else f"{value:.1e}x"
    rough = trial.get("rough", {}).get("repaired")
    return f"~{rough:.3g}x" if figure == QUALITY and rough is not None else "–"


def outcome(trial: Mapping[str, Any]) -> str:
    """How a trial ended, in one line."""
    if trial["state"] == "stopped":
        return f"stopped after {trial['after']}: {trial['why']}"
    if trial["state"] == "failed":
        return f"failed: {trial['why'].splitlines()[0]}"
    gates = ", ".join(trial["failed_gates"])
    return f"gate failed: {gates}" if gates else "finished"


def markdown(data: Mapping[str, Any]) -> str:
    """The page `sweep.md`."""
    trials = data["trials"]
    parts = [f"# {data['model']}: a sweep of {len(trials)} trials\n", protocol(data),
             as_markdown(table(trials))]
    for figure, name in measures(trials).items():
        labels = {t["name"]: t["label"] for t in trials}
        found = front(trials, figure)
        parts += [f"\n## Front of perplexity against {name}\n",
                  *(f"- {labels[n]}" for n in found or ()), *([] if found else ["No trial."])]
    parts += ["\n## Each trial as a plain run\n",
              *(f"- {t['label']}: `{t['command']}`" for t in trials)]
    return "\n".join(parts) + "\n"


def protocol(data: Mapping[str, Any]) -> str:
    """How the figures were made, in a few sentences."""
    return (f"Pruned over dense: perplexity and parameters lower is better, speeds higher. A trial "
            f"is on a front where no other is better in one and not worse in the other. `~` marks "
            f"a rough figure, of {data['recipe']['sweep']['rough_windows']} windows. {BENCHES}\n\n"
            f"Made by\n\n    {data['command']}\n")


BENCHES = ("While a trial was timed, no other trial ran on its machine: a file lock keeps them "
           "apart, whatever the number of trials at once.")


def as_csv(trials: Trials) -> str:
    """One line per trial."""
    timed = measures(trials)
    figures = [QUALITY, "perplexity.pruned", *timed, *SIZE, "block_parameters.ratio"]
    fields = ["name", "label", "state", "outcome", "front", *dict.fromkeys(figures),
              *(f"{f}.{end}" for f in timed if f in SPEEDS for end in ("low", "high")),
              *(f"rough.{point}" for point in ("prune", "repaired")), "seconds", "settings"]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for t in trials:
        spread = {f"{f}.{end}": value for f, own in t.get("spread", {}).items()
                  for end, value in own.items()}
        rough = {f"rough.{point}": value for point, value in t.get("rough", {}).items()}
        writer.writerow({**t, **t.get("figures", {}), **spread, **rough, "outcome": outcome(t),
                         "front": " ".join(t["front"]), "settings": " ".join(t["settings"])})
    return buffer.getvalue()
