"""All criteria at several ratios on one model, with every repair: a JSON file and a table.

    python benchmarks/criteria.py --out benchmarks/results/criteria-pico.json

Every method gets the same model, budget, calibration windows and test windows; scoring runs once
per criterion and seed. The random criterion and the windows are drawn anew for every seed. All
criteria are compared at uniform widths; the methods after them spread the same budget otherwise:
by global or adaptive widths, or by dropping whole parts as far as the ratio allows (half of them
at most), LLM-BIP's choice of groups making up the rest.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import bipdeploy
from bipdeploy import artifacts, console, recipe_file, sources
from bipdeploy.checkpoint import read_config
from bipdeploy.criteria import NAMES
from bipdeploy.data import text, windows
from bipdeploy.evaluation.perplexity import forward_of, perplexity
from bipdeploy.families import Architecture, BlockWidths, architecture
from bipdeploy.modeling import loading

WINDOW = 128


@dataclass(frozen=True)
class Method:
    """A criterion with its propagation, how the budget is spread, and what is dropped first."""

    criterion: str
    propagation: str = "bound"
    layers: str = "uniform"
    depth: str | None = None

    @property
    def scoring(self) -> list[str]:
        return [f"score.criterion={self.criterion}", f"score.propagation={self.propagation}"]


METHODS = {"llm_bip (bound)": Method("llm_bip"),
           "llm_bip (measured)": Method("llm_bip", "measured")}
METHODS |= {name: Method(name) for name in NAMES if name != "llm_bip"}
METHODS |= {f"{name}, {layers}": Method(name, layers=layers)
            for layers in ("global", "adaptive") for name in ("llm_bip", "flap")}
METHODS |= {f"llm_bip, {part} dropped first": Method("llm_bip", depth=part)
            for part in ("blocks", "attention", "ffn")}

REPAIRS = {"none": None, "bias": ["recover.method=bias"], "refit": ["recover.method=refit"],
           "refit_auto": ["recover.method=refit", "recover.refit.ridge=auto"]}


def perplexity_of(folder: Path, ids: torch.Tensor) -> float:
    """Perplexity of a model folder on a token sequence, windows of `WINDOW`, float32 on the CPU."""
    model = loading.load_model(folder, torch.float32, torch.device("cpu"))
    return perplexity(forward_of(model), ids, WINDOW, 16).perplexity


def dropped(arch: Architecture, part: str, ratio: float) -> int:
    """How many attentions, FFNs or blocks weigh less than the ratio, at most half of them."""
    own = arch.blocks[0]
    left = {"blocks": BlockWidths(0, 0, 0), "attention": BlockWidths(0, 0, own.intermediate),
            "ffn": BlockWidths(own.heads, own.kv_heads, 0)}[part]
    share = 1 - arch.block_parameters(0, left) / arch.block_parameters(0)
    count = len(arch.blocks)
    return min(math.ceil(ratio * count / share) - 1, count // 2)


def measure(model: str, method: Method, ratios: list[float], repairs: list[str], seed: int,
            settings: list[str], ids: torch.Tensor, work: Path) -> list[dict]:
    """One method and seed: a record per ratio and repair."""
    common = [*settings, f"seed={seed}"]
    scores = bipdeploy.score(model, work / "scores", [*common, *method.scoring])
    arch, records = architecture(read_config(sources.model_folder(model))), []
    for ratio in ratios:
        depth = {method.depth: dropped(arch, method.depth, ratio)} if method.depth else {}
        pruned = bipdeploy.prune(model, scores, work / "pruned", ratio, [
            *common, f"prune.layers={method.layers}", f"prune.depth={json.dumps(depth)}"])
        require_budget(arch, pruned, ratio, common)
        for repair in repairs:
            folder = pruned if REPAIRS[repair] is None else bipdeploy.recover(
                model, pruned, work / "repaired", [*common, *REPAIRS[repair]])
            records.append({
                "criterion": method.criterion, "propagation": method.propagation,
                "layers": method.layers, "depth": depth, "ratio": ratio, "seed": seed,
                "repair": repair,
                "removed": 1 - artifacts.figures([pruned, folder])["block_parameters.ratio"],
                "perplexity": perplexity_of(folder / "model", ids)})
    return records


def require_budget(arch: Architecture, pruned: Path, ratio: float, settings: list[str]) -> None:
    """Stop where a method did not get the same budget, to one rounding unit of every block."""
    base = {"name": "x", "model": {"id": "x"}, "prune": {"ratio": ratio}}
    round_to = recipe_file.build(base, "--set", settings).prune.round_to
    share = round_to * arch.channel_parameters() / arch.block_parameters(0)
    removed = 1 - artifacts.figures([pruned])["block_parameters.ratio"]
    assert abs(removed - ratio) <= share, f"{pruned}: {removed:.4f} is removed, {ratio} is asked"


def table(records: list[dict]) -> str:
    """Mean perplexity over seeds, with the largest distance from it, as Markdown."""
    columns = sorted({(r["ratio"], list(REPAIRS).index(r["repair"]), r["repair"])
                      for r in records})
    lines = ["| criterion | " + " | ".join(f"{ratio:.0%}, {repair}" for ratio, _, repair in columns)
             + " |", "|---" * (len(columns) + 1) + "|"]
    for method in dict.fromkeys(r["method"] for r in records):
        cells = []
        for ratio, _, repair in columns:
            values = [r["perplexity"] for r in records
                      if (r["method"], r["ratio"], r["repair"]) == (method, ratio, repair)]
            mean = statistics.fmean(values)
            cells.append(f"{mean:.2f} ± {max(abs(v - mean) for v in values):.2f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def repair_gain(records: list[dict], dense: float, method: str, ratio: float,
                repair: str) -> float:
    """Share of ln(perplexity / dense) that a repair takes away, mean over seeds."""
    def loss(repair: str) -> float:
        return statistics.fmean(math.log(r["perplexity"] / dense) for r in records if (
            r["method"], r["ratio"], r["repair"]) == (method, ratio, repair))

    return 1 - loss(repair) / loss("none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:pico")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--repairs", nargs="+", default=list(REPAIRS), choices=REPAIRS)
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
        for name in arguments.methods:
            work = Path(tempfile.mkdtemp())
            made = measure(arguments.model, METHODS[name], arguments.ratios, arguments.repairs,
                           seed, arguments.settings, ids, work)
            records += [{"method": name, **record} for record in made]
            shutil.rmtree(work)
            print(f"seed {seed}, {name}: {time.time() - began:.0f} s", flush=True)
    gains = {f"{name} at {ratio:.0%}, {repair}": repair_gain(records, dense, name, ratio, repair)
             for name in arguments.methods for ratio in arguments.ratios
             for repair in arguments.repairs
             if repair != "none" and "none" in arguments.repairs}
    command = shlex.join(["python", "benchmarks/criteria.py", *sys.argv[1:]])
    artifacts.write_json(arguments.out, {
        "command": command, "settings": arguments.settings, "seconds": round(time.time() - began),
        "environment": artifacts.environment(), "dense": dense,
        "test": {"data": test.name, "split": test.split, "sha256": test.sha256,
                 "tokens": len(ids), "window": WINDOW},
        "share_of_log_perplexity_repaired": gains, "records": records})
    print(f"dense {dense:.2f}\n\n{table(records)}\n\n{json.dumps(gains, indent=1)}")


if __name__ == "__main__":
    main()
