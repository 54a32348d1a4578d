"""Our figures beside the published ones, under the papers' protocol: JSON and Markdown.

    python benchmarks/paper_tables.py --out runs/paper-tables
    python benchmarks/paper_tables.py --model builtin:pico --data builtin:pydocs \\
        --tasks builtin:pydocs_choice --set prune.round_to=8 --out runs/paper-pico

Perplexity in windows of 128 tokens, zero-shot accuracy over seven tasks, at 20, 30 and 50%, by
`bipdeploy compare`: a second run of the same command goes on where the first stopped. Published
figures come from published.json and stand in columns of their own. What could not be had here
(weights, texts, tasks) is listed as "not run: why", and its cells say "not run".
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bipdeploy import api
from bipdeploy.cli import console
from bipdeploy.comparing import results
from bipdeploy.data import text
from bipdeploy.errors import BipdeployError, InputError
from bipdeploy.measuring import tasks
from bipdeploy.recipe import file as recipe_file
from bipdeploy.recipe import tasks as task_names
from bipdeploy.recipe.methods import method
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.reporting.markdown import as_markdown
from bipdeploy.running import artifacts, machine

PUBLISHED = Path(__file__).with_name("published.json")
MODELS = {"huggyllama/llama-7b": "LLaMA-7B", "lmsys/vicuna-7b-v1.3": "Vicuna-7B",
          "huggyllama/llama-13b": "LLaMA-13B"}
CRITERIA = ("llm_bip:bound", "wanda_sp", "flap@adaptive", "taylor")
REPAIRS = ("none", "bias", "refit", "lora", "refit+lora")
# (method, repair) here → the published method that it follows.
FOLLOWS = {("wanda_sp", "none"): "Wanda-sp", ("taylor", "none"): "LLM-Pruner",
           ("taylor", "lora"): "LLM-Pruner, LoRA", ("flap@adaptive", "bias"): "FLAP"}
WINDOW = "128"
NOT_RUN = "not run"


def main() -> int:
    asked = arguments()
    machine.quiet_libraries()
    try:
        return run(asked)
    except BipdeployError as error:
        console.err.print("error:", str(error), style="red", markup=False)
        return error.exit_code


def run(asked: argparse.Namespace) -> int:
    """Make both files; 1 where no model could be run. Raises InputError for a wrong option."""
    recipe(asked.model[0], asked.data, asked.tasks, asked)  # names are checked before all else
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    data, known_tasks, missing = obtainable(asked.data, asked.tasks)
    pages = []
    for model in asked.model:
        found: Mapping[str, Any] | None = None
        reasons = dict(missing)
        if data:
            wanted = recipe(model, data, known_tasks, asked)
            try:
                found = api.compare(wanted,
                                    asked.out / model.replace("/", "--").replace(":", "-"),
                                    command=command(), said=console.log).data
                reasons |= {about["cell"]: about["why"] for about in found["not_run"]}
            except BipdeployError as error:
                reasons[model] = str(error)
        pages.append(page(model, found, published["entries"], asked, reasons))
    artifacts.write_json(asked.out / "paper_tables.json", {
        "command": command(), "environment": machine.environment(),
        "published": published, "models": pages})
    shown = markdown(pages, published)
    (asked.out / "paper_tables.md").write_text(shown, encoding="utf-8")
    print(shown)
    return 0 if any(p["run"] for p in pages) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(MODELS))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA),
                        help="methods, as in compare.methods")
    parser.add_argument("--repairs", nargs="+", default=list(REPAIRS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data", nargs="+", default=["wikitext2", "ptb"], help="test texts")
    parser.add_argument("--tasks", nargs="*", default=["llm_bip_7"])
    parser.add_argument("--limit", type=int, help="documents of each task")
    parser.add_argument("--calibration", help="default: c4, or builtin:pydocs where that is tested")
    parser.add_argument("--set", dest="settings", action="append", default=[],
                        help="as --set of run")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    return asked


def command() -> str:
    return shlex.join(["python", "benchmarks/paper_tables.py", *sys.argv[1:]])


def obtainable(data: Sequence[str], asked: Sequence[str]
               ) -> tuple[list[str], list[str], dict[str, str]]:
    """The texts and tasks that can be had here, and why others cannot."""
    missing: dict[str, str] = {}

    def there(name: str, look: Any) -> bool:
        try:
            look()
        except InputError as error:
            missing[name] = str(error)
        return name not in missing

    texts = [d for d in data if there(d, lambda d=d: text.read(d, "test"))]
    return texts, [t for t in asked if there(t, lambda t=t: loaded(t))], missing


def loaded(task: str) -> None:
    """Load a task's documents. Raises InputError where they cannot be had."""
    wanted = tasks.find([task])
    from bipdeploy.measuring import zero_shot
    from bipdeploy.recipe.evaluate import ZeroShotSection

    with zero_shot.quiet():
        zero_shot.load(wanted, ZeroShotSection(enabled=True, tasks=[task]))


def recipe(model: str, data: Sequence[str], asked_tasks: Sequence[str],
           asked: argparse.Namespace) -> Recipe:
    """The papers' protocol for one model, with the options laid over it."""
    calibration = asked.calibration or (
        "builtin:pydocs" if "builtin:pydocs" in data else "c4")
    zero_shot: dict[str, Any] = {"enabled": bool(asked_tasks), "limit": asked.limit}
    if asked_tasks:
        zero_shot["tasks"] = list(asked_tasks)
    return recipe_file.build({
        "name": "paper-tables", "model": {"id": model},
        "calibration": {"data": calibration, "samples": 128},
        "prune": {"ratio": asked.ratios[0]},
        "evaluate": {"perplexity": {"data": data[0], "windows": [int(WINDOW)]},
                     "zero_shot": zero_shot},
        "compare": {"methods": asked.criteria, "ratios": asked.ratios, "seeds": asked.seeds,
                    "repairs": asked.repairs, "data": list(data[1:])}},
        "paper_tables", asked.settings)


def page(model: str, found: Mapping[str, Any] | None, published: Sequence[Mapping[str, Any]],
         asked: argparse.Namespace, reasons: Mapping[str, str]) -> dict[str, Any]:
    """One model's tables: a row per method and repair, ours and published at every ratio."""
    name = MODELS.get(model)
    metrics = [f"{data}.{WINDOW}" for data in asked.data]
    metrics += [f"accuracy.{task}" for task in asked.tasks]
    tables = []
    for metric in metrics:
        theirs = {(e["method"], e["ratio"]): e["value"] for e in published
                  if (e["model"], e["metric"]) == (name, metric)}
        rows = [{"method": "dense", "repair": "", "ours": [dense(found, metric)],
                 "published_method": "dense", "published": [theirs.get(("dense", 0.0))]}]
        for own in dict.fromkeys(str(method(c)) for c in asked.criteria):
            for repair in asked.repairs:
                followed = FOLLOWS.get((own, repair))
                rows.append({
                    "method": own, "repair": repair,
                    "ours": [ours(found, metric, own, repair, r) for r in asked.ratios],
                    "published_method": followed,
                    "published": [theirs.get((followed, r)) for r in asked.ratios]})
        tables.append({"metric": metric, "ratios": asked.ratios, "rows": rows})
    return {"model": model, "run": found is not None, "not_run": dict(reasons), "tables": tables}


def dense(found: Mapping[str, Any] | None, metric: str) -> float | None:
    """Our figure of the dense model; None: not run."""
    if found is None:
        return None
    if metric.startswith("accuracy."):
        accuracies = [value for r in found["records"]
                      if (value := accuracy(r, metric, "dense")) is not None]
        return accuracies[0] if accuracies else None
    own = found["dense"]["perplexity"].get(metric.removesuffix(f".{WINDOW}"))
    return own[WINDOW]["perplexity"] if own else None


def ours(found: Mapping[str, Any] | None, metric: str, own: str, repair: str,
         ratio: float) -> float | None:
    """Our figure of one cell, a mean over seeds; None: not run."""
    values: list[float | None] = []
    for r in found["records"] if found else []:
        if (r["method"], r["repair"], r["ratio"]) == (own, repair, ratio):
            text_figures = r["perplexity"].get(metric.removesuffix(f".{WINDOW}"))
            values.append(accuracy(r, metric, "pruned") if metric.startswith("accuracy.")
                          else text_figures[WINDOW]["perplexity"] if text_figures else None)
    known = [v for v in values if v is not None]
    return fmean(known) if known else None


def accuracy(record: Mapping[str, Any], metric: str, which: str) -> float | None:
    """The mean over the tasks that a name stands for, in %; None unless all of them were run."""
    figures = record.get("accuracy", {}).get("figures", {})
    names = [f"accuracy.{name}.{which}"
             for name in task_names.names([metric.removeprefix("accuracy.")])]
    return 100 * fmean(figures[n] for n in names) if all(n in figures for n in names) else None


def markdown(pages: Sequence[Mapping[str, Any]], published: Mapping[str, Any]) -> str:
    parts = ["# Our figures beside published ones\n", published["note"],
             "\nPublished figures are from other code, prompts and hardware than ours. Perplexity: "
             "lower is better; accuracy in %.\n"]
    for p in pages:
        parts.append(f"\n## {p['model']}\n")
        parts += [f"- not run: {what}: {why}" for what, why in p["not_run"].items()]
        for t in p["tables"]:
            heading = ["method", "repair", *(f"{r:.0%}, ours" for r in t["ratios"]),
                       "published method", *(f"{r:.0%}, published" for r in t["ratios"])]
            rows = [[row["method"], row["repair"],
                     *padded([NOT_RUN if v is None else results.shown(v) for v in row["ours"]], t),
                     row["published_method"] or "–",
                     *padded(["–" if v is None else results.shown(v) for v in row["published"]],
                             t)] for row in t["rows"]]
            parts += [f"\n{t['metric']}\n", as_markdown([heading, *rows])]
    averages = [e for e in published["entries"] if e["ratio"] is None]
    parts += ["\n## Published averages, not measured here\n",
              *(f"- {e['method']}, {e['model']}: {e['metric']}: {e['value']} ({e['source']})"
                for e in averages)]
    return "\n".join(parts) + "\n"


def padded(cells: list[str], table: Mapping[str, Any]) -> list[str]:
    """The dense model's one figure stands at the first ratio."""
    return cells + [""] * (len(table["ratios"]) - len(cells))


if __name__ == "__main__":
    sys.exit(main())
