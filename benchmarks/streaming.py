"""What scoring, pruning and repair hold in memory, on random-weight LLaMAs up to 7B.

    python benchmarks/streaming.py --work /tmp/streaming --out benchmarks/results/streaming-7b.json

Makes a checkpoint of the shape (bfloat16, in shards, written tensor by tensor), runs every stage
as the command line does, each in a process of its own, and records its seconds, its peak resident
memory, the peak of what of it is the process's own (anonymous: no file's pages), and the bytes it
read. Memory and time do not depend on what the weights are, so they are random.

`--overhead` compares scoring with a forward pass over the same windows, in turns, as ratios within
rounds: of the whole model in memory by transformers, and of the same walk without statistics.
It counts seconds by the clock and seconds of computing.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bipdeploy.data.calibration import calibration_batches
from bipdeploy.measuring.timing import Spread, interleaved, speedup
from bipdeploy.model import loading
from bipdeploy.model.blocks import BlockWalker
from bipdeploy.model.families import architecture
from bipdeploy.recipe import file as recipe_file
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.running import artifacts, machine
from bipdeploy.stages.score import score_blocks
from speed.models import random_checkpoint
from speed.shapes import SHAPES, config_of

IMPORTS = "import torch, transformers.models.llama.modeling_llama"
STAGES = ("imports", "score", "prune", "recover")  # the first: what the libraries alone take
SAMPLE_SECONDS = 0.02


def settings(arguments: argparse.Namespace) -> list[str]:
    return [f"calibration.samples={arguments.windows}", f"calibration.tokens={arguments.tokens}",
            f"calibration.batch={arguments.windows}", "model.device=cpu",
            f"prune.round_to={8 if arguments.shape == 'tiny' else 128}", *arguments.set]


def command(stage: str, work: Path, arguments: argparse.Namespace) -> list[str]:
    """The command line of a stage; its results go below `work`, where the model is."""
    if stage == "imports":
        return [sys.executable, "-c", IMPORTS]
    model, out = work / "model", work / stage
    places: dict[str, list[object]] = {"score": [model],
                                       "prune": [model, work / "score", "--ratio", arguments.ratio],
                                       "recover": [model, work / "prune"]}
    options = [part for value in settings(arguments) for part in ("--set", value)]
    return [str(Path(sys.executable).with_name("bipdeploy")), stage, *map(str, places[stage]),
            "--out", str(out), *options]


def watched(words: list[str]) -> dict[str, float]:
    """Run a command to its end; its seconds, peaks of memory and bytes read. Linux only.

    peak_bytes is the kernel's own high-water mark (getrusage's would count this process too, from
    which it is forked); anonymous and file-backed pages are sampled every 20 ms. read_bytes counts
    what it asked for, disk_bytes what was not in the page cache.
    """
    began = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    found: dict[str, float] = {}
    names = {"VmHWM": "peak_bytes", "RssAnon": "peak_anonymous_bytes", "RssFile": "peak_file_bytes"}
    counters = {"rchar": "read_bytes", "read_bytes": "disk_bytes", "wchar": "written_bytes"}
    while process.poll() is None:
        for line in _lines(process.pid, "status"):
            if (name := line.split(":")[0]) in names:
                size = int(line.split()[1]) * 1024
                found[names[name]] = max(found.get(names[name], 0), size)
        for line in _lines(process.pid, "io"):
            if (name := line.split(":")[0]) in counters:
                found[counters[name]] = int(line.split()[1])
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")
    return {"seconds": round(time.perf_counter() - began, 2), **found}


def _lines(pid: int, name: str) -> list[str]:
    try:
        return Path(f"/proc/{pid}/{name}").read_text().splitlines()
    except OSError:  # it ended in between
        return []


def overhead(model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of scoring over those of forward passes on the same windows."""
    recipe = recipe_file.build({"name": "overhead", "model": {"id": str(model)},
                                "prune": {"ratio": arguments.ratio}}, "--set", settings(arguments))
    walker = BlockWalker(model, recipe.model)
    windows, _ = calibration_batches(recipe, model, walker.architecture.max_positions)

    @torch.no_grad()
    def walk() -> None:
        hidden = walker.embed(windows)
        for block in walker.blocks(arguments.tokens):
            hidden = [block(x) for x in hidden]

    runs: dict[str, Callable[[], Any]] = {
        "forward": forward(model, recipe), "walk": walk,
        "score": partial(score_blocks, walker, windows, recipe)}
    times = interleaved({name: partial(timed, run) for name, run in runs.items()},
                        arguments.rounds, 1)
    return {measure: {
        "score_over": {name: speedup(times["score"][measure], times[name][measure]).as_dict()
                       for name in ("forward", "walk")},
        **{name: Spread.of(values[measure]).as_dict() for name, values in times.items()}}
        for measure in ("seconds", "cpu_seconds")}


def forward(model: Path, recipe: Recipe) -> Callable[[], None]:
    """A pass of the whole model in memory over the calibration windows, logits left out."""
    walker = BlockWalker(model, recipe.model)
    windows, _ = calibration_batches(recipe, model, walker.architecture.max_positions)
    whole = loading.load_model(model, walker.dtype, walker.device)

    @torch.no_grad()
    def run() -> None:
        for batch in windows:
            whole.model(batch.to(walker.device), use_cache=False)

    return run


def timed(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds by the clock, and those that all threads computed: others may share the machine."""
    began, computed = time.perf_counter(), time.process_time()
    run()
    return {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - computed}


def table(record: dict[str, Any]) -> str:
    """What was found, as Markdown."""
    lines = ["| stage | seconds | peak resident, GiB | anonymous, GiB | read, GiB |",
             "|---|---|---|---|---|"] if record["stages"] else []
    for stage, found in record["stages"].items():
        sizes = (found[key] / 2**30 for key in ("peak_bytes", "peak_anonymous_bytes", "read_bytes"))
        cells = " | ".join(f"{size:.2f}" for size in sizes)
        lines.append(f"| {stage} | {found['seconds']:.0f} | {cells} |")
    for measure, found in record.get("overhead", {}).items():
        for name, spread in found["score_over"].items():
            lines.append(f"\nscoring over {name}, {measure}: {spread['median']:.2f} "
                         f"({spread['low']:.2f} to {spread['high']:.2f})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="7B")
    parser.add_argument("--work", type=Path, help="where checkpoints are made; deleted at the end")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES))
    parser.add_argument("--overhead", action="store_true", help="compare scoring with forwards")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8, help="of --overhead")
    parser.add_argument("--set", nargs="*", default=[], help="more settings, section.field=value")
    arguments = parser.parse_args()
    machine.quiet_libraries()
    if arguments.work:
        arguments.work.mkdir(parents=True, exist_ok=True)
    work, began = Path(tempfile.mkdtemp(prefix="streaming-", dir=arguments.work)), time.time()
    record: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv), "shape": arguments.shape,
        "threads": torch.get_num_threads(), "environment": machine.environment()}
    try:
        model = random_checkpoint(work / "model", config_of(arguments.shape))
        record |= {"parameters": architecture(config_of(arguments.shape)).parameters(),
                   "weights_bytes": sum(p.stat().st_size for p in model.glob("*.safetensors")),
                   "seconds_to_make": round(time.time() - began, 1)}
        record["stages"] = {}
        for stage in arguments.stages:
            record["stages"][stage] = watched(command(stage, work, arguments))
            artifacts.write_json(arguments.out, record)  # a later stage may take an hour
        if arguments.overhead:
            record["overhead"] = overhead(model, arguments)
            artifacts.write_json(arguments.out, record)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(table(record))


if __name__ == "__main__":
    main()
