"""ONNX Runtime against PyTorch on this CPU, dense and pruned, at random-weight LLaMA shapes.

    python benchmarks/cpu_onnx.py --out benchmarks/results/cpu-onnx.json

Speed does not depend on what the weights are, so they are random, at uniform widths. Every round
runs every model once; ratios are taken within a round. Exports run in processes of their own, where
their time and peak memory are measured; `--exports` does only that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from bipdeploy.measuring import onnx_bench, torch_bench
from bipdeploy.measuring.timing import Spread, interleaved, speedup
from bipdeploy.model import loading
from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.model.families import architecture
from bipdeploy.ort.quantize import quantize
from bipdeploy.ort.runtime import OnnxModel
from bipdeploy.running import artifacts, machine
from speed.models import random_checkpoint
from speed.shapes import SHAPES, config_of, pruned_of

EXPORT = """
import json, sys, time
from pathlib import Path
from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.ort import folder
from bipdeploy.running.machine import PeakMemory
memory, began = PeakMemory(), time.perf_counter()
before = memory.bytes()
folder.write(Checkpoint(sys.argv[1]), Path(sys.argv[2]), style=sys.argv[3], dtype="float32")
print(json.dumps({"seconds": time.perf_counter() - began, "peak_bytes": memory.bytes() - before}))
"""


def export(model: Path, out: Path, style: str) -> dict[str, float]:
    """Write the ONNX folder in a new process; its seconds, and peak bytes above those at its
    start."""
    done = subprocess.run([sys.executable, "-c", EXPORT, model, out, style], check=True,
                          capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(shape: str, ratio: float, arguments: argparse.Namespace, work: Path) -> dict:
    """All models of one shape and ratio, interleaved."""
    config = config_of(shape, "float32")
    folders = {which: random_checkpoint(work / which, pruned_of(config, removed, 64))
               for which, removed in (("dense", 0), ("pruned", ratio))}
    exported = {which: export(folder, work / f"onnx-{which}", arguments.style)
                for which, folder in folders.items()}
    models = {f"onnx {which}": OnnxModel(work / f"onnx-{which}", "cpu") for which in folders}
    for variant in arguments.quantize:
        quantize(work / "onnx-pruned", work / f"onnx-{variant}", variant)
        models[f"{variant} pruned"] = OnnxModel(work / f"onnx-{variant}", "cpu")
    ids = torch.randint(4096, (1, arguments.prompt), generator=torch.Generator().manual_seed(0))
    runs = {name: partial(onnx_bench.rested, onnx_bench.generate, model, ids, arguments.new)
            for name, model in models.items()}
    for which, folder in folders.items():
        model = loading.load_model(folder, torch.float32, torch.device("cpu"))
        runs[f"torch {which}"] = partial(onnx_bench.rested, torch_bench.generate, model, ids,
                                           arguments.new)
    times = interleaved(runs, arguments.rounds, 2)
    sizes = {which: architecture(Checkpoint(folder).config).parameters()
             for which, folder in folders.items()}
    pairs = {"onnx pruned over onnx dense": ("onnx dense", "onnx pruned"),
             "torch pruned over torch dense": ("torch dense", "torch pruned"),
             "onnx dense over torch dense": ("torch dense", "onnx dense"),
             "onnx pruned over torch pruned": ("torch pruned", "onnx pruned"),
             **{f"{v} pruned over onnx dense": ("onnx dense", f"{v} pruned")
                for v in arguments.quantize}}
    return {"shape": shape, "ratio": ratio, "parameters": sizes, "export": exported,
            "ideal_speedup": sizes["dense"] / sizes["pruned"],
            "speedup": {name: {m: speedup(times[a][m], times[b][m]).as_dict()
                               for m in ("prefill", "decode")} for name, (a, b) in pairs.items()},
            "seconds": {name: {m: Spread.of(values[m]).as_dict() for m in ("prefill", "decode")}
                        for name, values in times.items()}}


def table(records: list[dict]) -> str:
    """Speed-ups as Markdown: median (quartiles)."""
    lines = ["| shape | removed | parameters | comparison | prefill | decode |",
             "|---|---|---|---|---|---|"]
    for r in records:
        for name, found in r["speedup"].items():
            cells = [f"{found[m]['median']:.2f} ({found[m]['low']:.2f}-{found[m]['high']:.2f})"
                     for m in ("prefill", "decode")]
            lines.append(f"| {r['shape']} | {r['ratio']:.0%} | 1/{r['ideal_speedup']:.2f} | {name} "
                         f"| {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=["30M"])
    parser.add_argument("--exports", nargs="*", choices=SHAPES, default=[])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.3, 0.5])
    parser.add_argument("--quantize", nargs="*", default=["int4", "int8_dynamic"])
    parser.add_argument("--style", choices=("gqa", "std"), default="gqa")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=33, help="tokens generated")
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    machine.quiet_libraries()
    began, records = time.time(), []
    for shape in arguments.shapes:
        for ratio in arguments.ratios:
            with tempfile.TemporaryDirectory() as work:
                records.append(measure(shape, ratio, arguments, Path(work)))
    exports = []
    for shape in arguments.exports:
        with tempfile.TemporaryDirectory() as work:
            dense = random_checkpoint(Path(work) / "dense", config_of(shape, "float32"))
            size = sum(path.stat().st_size for path in dense.glob("*.safetensors"))
            exports.append({"shape": shape, "weights_bytes": size,
                            **export(dense, Path(work) / "onnx", arguments.style)})
            print(exports[-1])
    result = {"command": "python " + " ".join(sys.argv), "seconds": round(time.time() - began),
              "threads": torch.get_num_threads(), "environment": machine.environment(),
              "onnxruntime": machine.version_of("onnxruntime"), "records": records,
              "exports": exports}
    artifacts.write_json(arguments.out, result)
    if records:
        print(table(records))


if __name__ == "__main__":
    main()
