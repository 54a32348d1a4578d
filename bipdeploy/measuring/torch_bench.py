"""Latency in PyTorch: prefill, time to first token, decode with a KV cache."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bipdeploy.errors import StageError, says_no_memory
from bipdeploy.measuring.table import refuse_torch
from bipdeploy.measuring.timing import Spread, interleaved, speedup
from bipdeploy.model import loading
from bipdeploy.model.blocks import compute_device, compute_dtype
from bipdeploy.model.checkpoint import read_config
from bipdeploy.planning.job import Job
from bipdeploy.recipe.bench import OnnxBench, TorchBench
from bipdeploy.recipe.figures import compared
from bipdeploy.running.machine import release_memory

if TYPE_CHECKING:
    import torch

GRAPHS, EAGER = "CUDA graph of a step, static cache; decode_eager: without", "eager"


def how(times: Mapping[str, object]) -> str:
    """How decoding was timed, in words."""
    return GRAPHS if "decode_eager" in times else EAGER


def run(job: Job) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures and details of dense against exported, interleaved."""
    import torch

    section = job.recipe.bench.torch
    folders = {"dense": job.inputs["dense"], "pruned": job.inputs["exported"]}
    refuse_torch(job.dense)
    device = compute_device(job.recipe.model)
    dtype = compute_dtype(job.recipe.model, job.dense.config, device)
    job.reporter.total(section.warmup + section.repeats + 2 * section.memory, "rounds")
    models = {which: loading.load_model(folder, dtype, device,
                                        trust_remote_code=job.recipe.model.trust_remote_code)
              for which, folder in folders.items()}
    generator = torch.Generator().manual_seed(job.recipe.seed)
    ids = torch.randint(job.dense.architecture.vocabulary, (section.batch, section.prompt_tokens),
                        generator=generator).to(device)
    runs = {which: generation(model, ids, section.new_tokens) for which, model in models.items()}
    times = interleaved(runs, section.repeats, section.warmup, job.reporter.advance)
    del models, runs
    release_memory()  # the processes that measure memory take the same GPU
    figures, details = summarise(times, section)
    details["decode"] = how(times["dense"])
    details |= {"device": str(device), "dtype": str(dtype), "threads": torch.get_num_threads()}
    if section.memory:
        peaks = {}
        for which, folder in folders.items():
            peaks[which] = peak_memory(folder, job, section)
            job.reporter.advance()
        figures |= compared("memory", peaks["dense"], peaks["pruned"])
        details["memory"] = ("peak bytes while loading and generating, "
                             + ("allocated on the GPU" if device.type == "cuda" else
                                "resident, above the process before loading"))
    return figures, details


def generation(model: torch.nn.Module, ids: torch.Tensor, new_tokens: int,
               clock: Callable[[], float] = time.perf_counter) -> Callable[[], dict[str, float]]:
    """What measures one generation as `generate` does. On CUDA, `decode` is of a recorded step,
    and what `generate` finds is called `decode_eager`; a step that cannot be recorded stays eager.
    """
    run = partial(generate, model, ids, new_tokens, clock)
    if ids.device.type != "cuda":
        return run
    from bipdeploy.measuring.graphs import RecordedDecoder, recordable

    if not recordable(model, ids.shape[1] + new_tokens - 1):
        return run

    def both() -> dict[str, float]:
        times = run()
        # Recorded in its turn, so that no other model's cache and graph are in memory meanwhile.
        recorded = RecordedDecoder(model, ids, new_tokens - 1)
        return {**times, "decode": recorded.seconds(), "decode_eager": times["decode"]}

    return both


def generate(model: torch.nn.Module, ids: torch.Tensor, new_tokens: int,
             clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Seconds of one greedy generation for ids [B, T]: prefill, ttft, decode (per token).

    `prefill` is the forward pass over the prompt; `ttft` adds choosing the first token; `decode`
    is the mean of the steps after it.
    """
    import torch

    def now() -> float:
        if ids.device.type == "cuda":
            torch.cuda.synchronize()
        return clock()

    with torch.inference_mode():
        began = now()
        out = model(ids, use_cache=True, logits_to_keep=1)
        prefilled = now()
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        first = now()
        for _ in range(new_tokens - 1):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        ended = now()
    return {"prefill": prefilled - began, "ttft": first - began,
            "decode": (ended - first) / (new_tokens - 1)}


def summarise(times: dict[str, dict[str, list[float]]],
              section: TorchBench | OnnxBench) -> tuple[dict[str, float], dict[str, Any]]:
    """Times as figures: prefill and ttft in milliseconds, decode in tokens per second."""
    figures: dict[str, float] = {}
    details: dict[str, Any] = {"units": {"prefill": "ms", "ttft": "ms", "decode": "tokens/s"},
                               "repeats": section.repeats, "batch": section.batch,
                               "prompt_tokens": section.prompt_tokens,
                               "new_tokens": section.new_tokens, "spread": {}}
    for measure in times["dense"]:
        found = {}
        for which, measured in times.items():
            values = ([section.batch / t for t in measured[measure]] if "decode" in measure
                      else [t * 1e3 for t in measured[measure]])
            found[f"{measure}.{which}"] = Spread.of(values)
        found[f"{measure}.speedup"] = speedup(times["dense"][measure], times["pruned"][measure])
        details["spread"] |= {name: spread.as_dict() for name, spread in found.items()}
        if measure in ("prefill", "decode", "ttft"):
            figures |= {name: spread.median for name, spread in found.items()}
    return figures, details


def peak_memory(folder: Path, job: Job, section: TorchBench) -> float:
    """Peak bytes of one model in a process of its own, so that neither hides behind the other."""
    arguments = {"folder": str(folder), "model": job.recipe.model.model_dump(),
                 "batch": section.batch, "prompt_tokens": section.prompt_tokens,
                 "new_tokens": section.new_tokens}
    child = subprocess.run([sys.executable, "-m", "bipdeploy.measuring.torch_bench"],
                           input=json.dumps(arguments), capture_output=True, text=True, check=False)
    if child.returncode:
        last = (child.stderr.strip() or "no output").splitlines()[-1]
        if says_no_memory(last):
            raise MemoryError(last)
        raise StageError(f"measuring the memory of {folder} failed: {last}")
    return float(json.loads(child.stdout.splitlines()[-1])["bytes"])


def _child() -> None:
    """Load one model, generate once, print the peak."""
    import torch

    from bipdeploy.recipe.model import ModelSection
    from bipdeploy.running.machine import PeakMemory, quiet_libraries

    quiet_libraries()
    arguments = json.loads(sys.stdin.read())
    section, folder = ModelSection(**arguments["model"]), Path(arguments["folder"])
    device = compute_device(section)
    dtype = compute_dtype(section, read_config(folder), device)
    # Loading a first, tiny module brings the libraries' own memory in before the baseline.
    loading.load_config(folder, trust_remote_code=section.trust_remote_code)
    torch.nn.Linear(64, 64, device=device)(torch.ones(1, 64, device=device))
    memory = PeakMemory()
    before = memory.bytes()
    model = loading.load_model(folder, dtype, device, trust_remote_code=section.trust_remote_code)
    ids = torch.zeros(arguments["batch"], arguments["prompt_tokens"], dtype=torch.long)
    generate(model, ids.to(device), arguments["new_tokens"])
    peak = (torch.cuda.max_memory_allocated() if device.type == "cuda"
            else memory.bytes() - before)
    print(json.dumps({"bytes": peak}))


if __name__ == "__main__":
    _child()
