"""Speed targets end to end: the speed-up that was asked for beside the one that bench measures.

    python benchmarks/target_speedup.py --out benchmarks/results/target-speedup.json

A random-weight LLaMA of about 100M parameters is profiled on this machine, pruned (by magnitude,
uniform widths) to every target, and measured against the dense model as the bench stage does it:
whole models, interleaved, ratios within a round.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from bipdeploy import api
from bipdeploy.measuring.timing import interleaved, speedup
from bipdeploy.measuring.torch_bench import generate
from bipdeploy.model import loading
from bipdeploy.running import artifacts, machine
from speed.models import random_checkpoint
from speed.shapes import SHAPES, config_of

TARGETS = (("decode", 1.2), ("decode", 1.3), ("decode", 1.5), ("prefill", 1.3))
SHAPE = "98M"


def pairs(dense: torch.nn.Module, pruned: torch.nn.Module, ids: torch.Tensor,
          arguments: argparse.Namespace) -> dict:
    """Speed-ups of a pruned model: each round runs both, in alternating order."""
    times = interleaved({"dense": lambda: generate(dense, ids, arguments.new),
                         "pruned": lambda: generate(pruned, ids, arguments.new)},
                        arguments.rounds, 2)
    found = {}
    for phase in ("prefill", "decode"):
        low = {which: sorted(t[phase])[len(t[phase]) // 4] for which, t in times.items()}
        found[phase] = {**speedup(times["dense"][phase], times["pruned"][phase]).as_dict(),
                        "of_lower_quartiles": low["dense"] / low["pruned"],
                        "dense_seconds": median(times["dense"][phase]),
                        "pruned_seconds": median(times["pruned"][phase])}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=17, help="tokens generated")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    machine.quiet_libraries()
    began, records = time.time(), []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        dense = str(random_checkpoint(work / "dense", config_of(SHAPE, "float32")))
        common = ["score.criterion=magnitude", "calibration.samples=1", "calibration.tokens=16",
                  "prune.round_to=16", "model.device=cpu"]
        table = api.profile(dense, common, batch=1, context=arguments.prompt)
        for name, phase in table.phases.items():
            print(name, {k: round(v, 4) for k, v in phase.check.items()}, flush=True)
        scores = api.score(dense, work / "scores", common)
        device = torch.device("cpu")
        model = loading.load_model(Path(dense), torch.float32, device)
        ids = torch.randint(SHAPES[SHAPE].vocabulary, (1, arguments.prompt),
                            generator=torch.Generator().manual_seed(0))
        for phase, asked in TARGETS:
            target = f"{{{phase}_speedup: {asked}, batch: 1, context: {arguments.prompt}}}"
            out = api.prune(dense, scores, work / f"{phase}-{asked}", None,
                            [*common, f"prune.target={target}"])
            pruned = loading.load_model(out / "model", torch.float32, device)
            found = pairs(model, pruned, ids, arguments)
            kept = artifacts.read_json(out / "kept.json")
            error = found[phase]["median"] / asked - 1
            records.append({"phase": phase, "asked": asked, "predicted": kept["target"]["reached"],
                            "measured": found[phase], "error": error, "both_phases": found,
                            "parameters_removed": kept["ratio"], "widths": {
                                k: kept["blocks"][0][k] for k in ("kv_heads", "intermediate")}})
            print(f"{phase} {asked}: predicted {kept['target']['reached']:.3f}, measured "
                  f"{found[phase]['median']:.3f} ({found[phase]['low']:.3f} to "
                  f"{found[phase]['high']:.3f}), {error:+.1%}", flush=True)
    artifacts.write_json(arguments.out, {
        "command": "python " + " ".join(sys.argv), "seconds": round(time.time() - began),
        "threads": torch.get_num_threads(), "environment": machine.environment(),
        "shape": config_of(SHAPE, "float32"),
        "profile": {"rounds": table.rounds, "seconds": table.seconds,
                    "checks": {n: p.check for n, p in table.phases.items()}},
        "records": records})


if __name__ == "__main__":
    main()
