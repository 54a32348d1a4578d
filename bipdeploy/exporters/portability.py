"""Which engine loads an exported checkpoint, and how: every way is tried in a fresh process.

A way counts as verified when the engine continues several prompts as the sliced PyTorch model
does: the same greedy tokens in float32, and log-probabilities that agree.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bipdeploy.errors import InputError, StageError
from bipdeploy.model.families import Architecture
from bipdeploy.model.routes import FAILED, ROUTES, VERIFIED, Route
from bipdeploy.serving import engine as engines
from bipdeploy.serving import probe
from bipdeploy.serving.engine import Engine

PROMPT_TOKENS = (5, 9, 17, 33)  # lengths of the prompts, in turn

# How far log-probabilities of one model may lie apart between engines (natural logarithm).
TOLERANCE = {"float32": 0.005, "float16": 0.1, "bfloat16": 0.5}


@dataclass(frozen=True)
class Question:
    """What every engine is asked: prompts as token ids, and how to continue them."""

    prompts: list[list[int]]
    new_tokens: int
    dtype: str
    device: str


def draw_question(arch: Architecture, seed: int, prompts: int, new_tokens: int, dtype: str,
                  device: str) -> Question:
    """Prompts of random tokens that fit the model with what is generated."""
    draw = random.Random(seed)
    longest = arch.max_positions - new_tokens - 1
    lengths = [min(PROMPT_TOKENS[i % len(PROMPT_TOKENS)], longest) for i in range(prompts)]
    return Question([[draw.randrange(arch.vocabulary) for _ in range(n)] for n in lengths],
                    new_tokens, dtype, device)


def reference(sliced: Path, question: Question) -> dict[str, Any]:
    """What the sliced model itself says, as bipdeploy loads it. Raises StageError where it cannot
    be run."""
    try:
        return ask(Route("transformers", "", "", True, True, bipdeploy=True), sliced, question, [])
    except ProbeFailed as failed:
        raise StageError(f"the sliced model cannot be run: {failed}") from failed


def verify(name: str, folder: Path, question: Question, reference: Mapping[str, Any],
           engine: Engine | None, tensor_parallel: int = 1) -> dict[str, Any]:
    """Try one route: {"status", "why", ...}. `engine` is the installed vLLM, for its routes."""
    route, began = ROUTES[name], time.monotonic()
    try:
        answer = ask(route, folder, question, reference["tokens"], engine, tensor_parallel)
    except ProbeFailed as failed:
        return {"status": FAILED, "why": str(failed)}
    agreed = compare(reference, answer, question.dtype)
    return {"status": FAILED if agreed["why"] else VERIFIED, **agreed, "class": answer["class"],
            "seconds": round(time.monotonic() - began, 1)}


class ProbeFailed(Exception):
    """An engine could not load the checkpoint, or not run it; the message is the cause."""


def ask(route: Route, folder: Path, question: Question, continuations: Sequence[Sequence[int]],
        engine: Engine | None = None, tensor_parallel: int = 1) -> dict[str, Any]:
    """What one engine generates, and how likely it finds `continuations`; see `probe.py`."""
    request: dict[str, Any] = {
        "engine": route.engine, "folder": str(folder.resolve()), "prompts": question.prompts,
        "continuations": continuations, "new_tokens": question.new_tokens,
        "dtype": question.dtype, "device": question.device, "bipdeploy": route.bipdeploy,
        "trust_remote_code": route.trust_remote_code}
    with tempfile.TemporaryDirectory(prefix="bipdeploy-") as place:
        request["out"] = str(Path(place) / "answer.json")
        if route.engine == "vllm":
            if engine is None:
                raise InputError("vLLM is not installed")
            request["options"] = {
                "enforce_eager": True, "enable_prefix_caching": False,
                "max_model_len": max(map(len, question.prompts)) + question.new_tokens + 1,
                "tensor_parallel_size": tensor_parallel,
                **({"model_impl": route.model_impl} if route.model_impl else {})}
            with engines.environment(engine, cache_gib=1, plugin=route.bipdeploy) as variables:
                # One process starts faster than two, and nothing is worth compiling.
                variables |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_COMPILE_DISABLE": "1"}
                _run(request, place, variables)
        else:
            _run(request, place, None)
        return json.loads(Path(request["out"]).read_text())


def _run(request: Mapping[str, Any], folder: str, variables: Mapping[str, str] | None) -> None:
    # -P and another working directory: no checkout of bipdeploy is on the path by accident.
    child = subprocess.run([sys.executable, "-P", probe.__file__], input=json.dumps(request),
                           cwd=folder, env=variables, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True, errors="replace", check=False)
    if child.returncode:
        raise ProbeFailed(engines.cause(child.stdout))


def compare(reference: Mapping[str, Any], answer: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """How an answer agrees with the reference; `why` says what does not, or is None.

    Greedy tokens are compared in float32. Two tokens that the reference finds equally likely, to
    within the tolerance, may be chosen either way: from there on a prompt is not compared. The
    log-probabilities of the reference's tokens are compared in every type.
    """
    allowed, equal, ties, why = TOLERANCE[dtype], 0, 0, None
    for prompt, (wanted, got) in enumerate(zip(reference["tokens"], answer["tokens"],
                                               strict=True)):
        differs = next((i for i, pair in enumerate(zip(wanted, got, strict=True))
                        if pair[0] != pair[1]), None)
        if differs is None:
            equal += 1
        elif reference["margins"][prompt][differs] <= 2 * allowed:
            ties += 1
        elif dtype == "float32":
            why = why or (f"prompt {prompt}: token {differs} is {got[differs]}, and the sliced "
                          f"model says {wanted[differs]}")
    differences = [abs(a - b) for wanted, got in zip(reference["logprobs"], answer["scored"],
                                                     strict=True)
                   for a, b in zip(wanted, got, strict=True)]
    largest = max(differences, key=lambda d: (math.isnan(d), d))
    if not largest <= allowed:
        why = f"log-probabilities differ by {largest:.3g}, allowed {allowed:g}"
    return {"why": why, "prompts": len(reference["tokens"]), "equal_tokens": equal, "ties": ties,
            "largest_logprob_difference": largest}
