"""Throughput and latency in vLLM, measured by vLLM's own benchmark tools, dense beside pruned."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bipdeploy.errors import InputError, StageError
from bipdeploy.measuring.timing import Spread, interleaved, speedup
from bipdeploy.model.blocks import compute_device, compute_dtype
from bipdeploy.model.families import Architecture
from bipdeploy.planning.job import Job
from bipdeploy.recipe.figures import VLLM_PERCENTILES as PERCENTILES
from bipdeploy.recipe.figures import compared, load_points
from bipdeploy.running.machine import release_memory
from bipdeploy.serving import engine as engines
from bipdeploy.serving import server
from bipdeploy.serving.engine import Engine
from bipdeploy.serving.server import Server

RATES = ("requests", "output_tokens", "throughput")  # more is faster; of times, less is
# `vllm bench latency` draws token ids below this, whatever the model's vocabulary.
LATENCY_TOOL_VOCABULARY = 10_000
WARMUPS = 2


def run(job: Job) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures and details of dense against exported. Where vLLM cannot run: none, and why."""
    folders = {"dense": job.inputs["dense"], "pruned": job.inputs["served"]}
    split = job.recipe.hardware.tensor_parallel
    try:
        engine = engines.find()
        if engine.devices < split:
            raise InputError(f"hardware.tensor_parallel is {split}, and here are "
                             f"{engine.devices} devices")
        sizes = {which: server.checked(folder, engine, split)
                 for which, folder in folders.items()}
    except InputError as error:
        job.reporter.note(f"bench.vllm not run: {error}")
        return {}, {"not_run": str(error)}
    release_memory()
    return Measurement(job, engine, folders, sizes).all()


class Measurement:
    """Both models, one engine, and what is measured of them so far."""

    def __init__(self, job: Job, engine: Engine, folders: Mapping[str, Path],
                 sizes: Mapping[str, Architecture]):
        self.job, self.engine, self.folders, self.sizes = job, engine, folders, sizes
        self.section = job.recipe.bench.vllm
        self.points = load_points(self.section)
        dtype = compute_dtype(job.recipe.model, job.dense.config,
                              compute_device(job.recipe.model))
        tokens = self.section.prompt_tokens + self.section.new_tokens
        eager = engine.device == "cpu" if self.section.eager == "auto" else self.section.eager
        self.options: dict[str, Any] = {
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": min(sizes["dense"].max_positions, max(2048, tokens + 64)),
            "enforce_eager": eager, "tensor_parallel_size": job.recipe.hardware.tensor_parallel,
            "trust_remote_code": job.recipe.model.trust_remote_code,
            "no_enable_prefix_caching": True}  # every round sends the same prompts
        self.figures: dict[str, float] = {}
        self.spread: dict[str, Any] = {}
        self.commands: dict[str, str] = {}

    def all(self) -> tuple[dict[str, float], dict[str, Any]]:
        section = self.section
        latency = self.sizes["dense"].vocabulary >= LATENCY_TOOL_VOCABULARY
        steps = 2 + len(self.points) * section.rounds + section.offline_rounds * (1 + latency)
        self.job.reporter.total(steps, "measurements")
        self.serve()
        self._offline("throughput", self._throughput)
        details: dict[str, Any] = {
            "engine": str(self.engine), "options": self.options, "commands": self.commands,
            "prompt_tokens": section.prompt_tokens, "new_tokens": section.new_tokens,
            "requests": section.requests, "rounds": section.rounds,
            "offline_rounds": section.offline_rounds, "points": list(self.points)}
        if latency:
            self._offline("latency", self._latency)
        else:
            details["latency_not_run"] = (
                f"`vllm bench latency` draws token ids up to {LATENCY_TOOL_VOCABULARY:,}, and the "
                f"vocabulary has {self.sizes['dense'].vocabulary:,}")
        return self.figures, {**details, "spread": self.spread}

    def serve(self) -> None:
        """Both servers up at once, so that neighbouring measurements alternate between them."""
        with ExitStack() as stack:
            servers = {which: stack.enter_context(self._server(folder))
                       for which, folder in self.folders.items()}
            self.figures |= compared("vllm.startup", *(servers[which].startup_seconds
                                                       for which in ("dense", "pruned")))
            self.figures |= compared("vllm.kv_tokens", *(servers[which].cache_tokens()
                                                         for which in ("dense", "pruned")))
            for point, load in self.points.items():
                runs = {which: partial(self._load, which, running, point, load)
                        for which, running in servers.items()}
                self._keep(f"vllm.serve.{point}", interleaved(runs, self.section.rounds, 0,
                                                              self.job.reporter.advance))

    @contextmanager
    def _server(self, folder: Path) -> Iterator[Server]:
        options = dict(self.options)
        if self.engine.device == "cuda":
            options["gpu_memory_utilization"] = self.section.gpu_memory
        with (engines.environment(self.engine, self.section.cpu_cache_gib) as variables,
              Server(folder, variables, "127.0.0.1", server.free_port(),
                     engines.flags(options)) as running):
            running.wait_healthy()
            self.job.reporter.advance()
            yield running

    def _load(self, which: str, running: Server, point: str,
              load: Mapping[str, Any]) -> dict[str, float]:
        """One measurement of one server at one load."""
        section, folder = self.section, self.folders[which]
        flags = engines.flags({
            "model": folder, "tokenizer": folder, "host": running.host, "port": running.port,
            "dataset_name": "random", "random_input_len": section.prompt_tokens,
            "random_output_len": section.new_tokens, "num_prompts": section.requests,
            "num_warmups": WARMUPS, "ignore_eos": True, "seed": self.job.recipe.seed,
            "percentile_metrics": "ttft,tpot,itl", "disable_tqdm": True,
            "metric_percentiles": ",".join(map(str, PERCENTILES)),
            "trust_remote_code": self.job.recipe.model.trust_remote_code, **load})
        result = self._tool(f"serve.{point}.{which}", ["serve", *flags, "--save-result",
                                                       "--result-filename"])
        if result["completed"] != section.requests:
            raise StageError(f"vLLM answered {result['completed']} of {section.requests} requests "
                             f"({which} model, {point}): {engines.cause(running.output())}")
        return {"requests": result["request_throughput"],
                "output_tokens": result["output_throughput"],
                **{f"{metric}.p{p}": result[f"p{p}_{metric}_ms"]
                   for metric in ("ttft", "tpot", "itl") for p in PERCENTILES}}

    def _throughput(self, which: str) -> float:
        """Tokens per second, of prompts and answers together, all requests at once."""
        section = self.section
        flags = engines.flags({
            "model": self.folders[which], "dataset_name": "random", **self.options,
            "random_input_len": section.prompt_tokens, "random_output_len": section.new_tokens,
            "num_prompts": section.requests, "seed": self.job.recipe.seed})
        result = self._tool(f"throughput.{which}", ["throughput", *flags, "--output-json"])
        return result["tokens_per_second"]

    def _latency(self, which: str) -> float:
        """Milliseconds of one batch, prefill and decode."""
        section = self.section
        flags = engines.flags({
            "model": self.folders[which], **self.options, "input_len": section.prompt_tokens,
            "output_len": section.new_tokens, "batch_size": section.latency_batch,
            "num_iters_warmup": WARMUPS, "num_iters": 10, "seed": self.job.recipe.seed})
        result = self._tool(f"latency.{which}", ["latency", *flags, "--output-json"])
        return 1e3 * median(result["latencies"])

    def _offline(self, name: str, measure: Callable[[str], float]) -> None:
        def once(which: str) -> dict[str, float]:
            return {name: measure(which)}

        runs = {which: partial(once, which) for which in self.folders}
        self._keep("vllm", interleaved(runs, self.section.offline_rounds, 0,
                                       self.job.reporter.advance))

    def _tool(self, name: str, arguments: list[str]) -> Any:
        """Run `vllm bench ...`, whose last argument is the file for the result; the result."""
        file = self.job.out / "vllm" / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.unlink(missing_ok=True)
        command = engines.command("bench", *arguments, file.resolve())
        self.commands[name] = " ".join(["vllm", *command[3:-1], file.name])
        with engines.environment(self.engine, self.section.cpu_cache_gib) as variables:
            variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True,
                                  stderr=subprocess.STDOUT, errors="replace", check=False)
        if done.returncode or not file.is_file():
            raise StageError(f"vllm bench {arguments[0]} failed ({name}): "
                             f"{engines.cause(done.stdout)}")
        return json.loads(file.read_text())

    def _keep(self, prefix: str, times: Mapping[str, Mapping[str, list[float]]]) -> None:
        """Medians and quartiles of dense, pruned and their ratio within each round."""
        for measure in times["dense"]:
            dense, pruned = times["dense"][measure], times["pruned"][measure]
            gain = speedup(pruned, dense) if measure in RATES else speedup(dense, pruned)
            for kind, spread in (("dense", Spread.of(dense)), ("pruned", Spread.of(pruned)),
                                 ("speedup", gain)):
                self.figures[f"{prefix}.{measure}.{kind}"] = spread.median
                self.spread[f"{prefix}.{measure}.{kind}"] = spread.as_dict()
