"""All criteria at several ratios on one model, without and with refit: a JSON file and a table.

    python benchmarks/criteria.py --out benchmarks/results/criteria-pico.json

Every method gets the same model, widths, calibration windows and test windows; scoring runs once
per criterion and seed. The random criterion and the windows are drawn anew for every seed.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

import bipdeploy
from bipdeploy import artifacts, console, sources
from bipdeploy.criteria import NAMES
from bipdeploy.data import text, windows
from bipdeploy.evaluation.perplexity import forward_of, perplexity
from bipdeploy.modeling import loading

WINDOW = 128
METHODS = {"llm_bip (bound)": ("llm_bip", "bound"), "llm_bip (measured)": ("llm_bip", "measured")}
METHODS |= {name: (name, "bound") for name in NAMES if name != "llm_bip"}


def perplexity_of(folder: Path, ids: torch.Tensor) -> float:
    """Perplexity of a model folder on a token sequence, windows of `WINDOW`, float32 on the CPU."""
    model = loading.load_model(folder, torch.float32, torch.device("cpu"))
    return perplexity(forward_of(model), ids, WINDOW, 16).perplexity


def measure(model: str, method: str, ratios: list[float], seed: int, settings: list[str],
            ids: torch.Tensor, work: Path) -> list[dict]:
    """One method and seed: a record per ratio and repair."""
    criterion, propagation = METHODS[method]
    common = [*settings, f"seed={seed}"]
    scores = bipdeploy.score(model, work / "scores", [
        *common, f"score.criterion={criterion}", f"score.propagation={propagation}"])
    records = []
    for ratio in ratios:
        pruned = bipdeploy.prune(model, scores, work / "pruned", ratio, common)
        repaired = bipdeploy.recover(model, pruned, work / "repaired", common)
        for repair, folder in (("none", pruned), ("refit", repaired)):
            records.append({"method": method, "ratio": ratio, "seed": seed, "repair": repair,
                            "removed": 1 - artifacts.figures([pruned])["block_parameters.ratio"],
                            "perplexity": perplexity_of(folder / "model", ids)})
    return records


def table(records: list[dict]) -> str:
    """Mean perplexity over seeds, with the largest distance from it, as Markdown."""
    columns = sorted({(r["ratio"], r["repair"]) for r in records})
    lines = ["| criterion | " + " | ".join(f"{ratio:.0%}, {repair}" for ratio, repair in columns)
             + " |", "|---" * (len(columns) + 1) + "|"]
    for method in dict.fromkeys(r["method"] for r in records):
        cells = []
        for column in columns:
            values = [r["perplexity"] for r in records
                      if (r["method"], r["ratio"], r["repair"]) == (method, *column)]
            mean = statistics.fmean(values)
            cells.append(f"{mean:.2f} ± {max(abs(v - mean) for v in values):.2f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def repair_gain(records: list[dict], dense: float, method: str, ratio: float) -> float:
    """Share of ln(perplexity / dense) that the refit takes away, mean over seeds."""
    def loss(repair: str) -> float:
        return statistics.fmean(math.log(r["perplexity"] / dense) for r in records if (
            r["method"], r["ratio"], r["repair"]) == (method, ratio, repair))

    return 1 - loss("refit") / loss("none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:pico")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", dest="settings", action="append", default=[
        "calibration.samples=256", "prune.round_to=8"], help="for every method, as --set of run")
    parser.add_argument("--data", default="builtin:pydocs", help="test text")
    parser.add_argument("--tokens", type=int, default=100_000, help="of the test text")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    console.quiet_libraries()
    began, records = time.time(), []
    folder = sources.model_folder(arguments.model)
    test = text.read(arguments.data, "test")
    ids = windows.token_ids(test, folder)[:arguments.tokens]
    dense = perplexity_of(folder, ids)
    for seed in arguments.seeds:
        for method in METHODS:
            work = Path(tempfile.mkdtemp())
            records += measure(arguments.model, method, arguments.ratios, seed,
                               arguments.settings, ids, work)
            shutil.rmtree(work)
            print(f"seed {seed}, {method}: {time.time() - began:.0f} s", flush=True)
    gains = {f"{method} at {ratio:.0%}": repair_gain(records, dense, method, ratio)
             for method in METHODS for ratio in arguments.ratios}
    command = (f"python benchmarks/criteria.py --model {arguments.model} "
               f"--ratios {' '.join(map(str, arguments.ratios))} "
               f"--seeds {' '.join(map(str, arguments.seeds))} --out {arguments.out}")
    artifacts.write_json(arguments.out, {
        "command": command, "settings": arguments.settings, "seconds": round(time.time() - began),
        "environment": artifacts.environment(), "dense": dense,
        "test": {"data": test.name, "split": test.split, "sha256": test.sha256,
                 "tokens": len(ids), "window": WINDOW},
        "share_of_log_perplexity_repaired": gains, "records": records})
    print(f"dense {dense:.2f}\n\n{table(records)}\n\n{json.dumps(gains, indent=1)}")


if __name__ == "__main__":
    main()
