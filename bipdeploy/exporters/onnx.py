"""Target `onnx`: a graph with a KV cache, checked in ONNX Runtime against the sliced model."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bipdeploy.errors import StageError
from bipdeploy.exporters import portability
from bipdeploy.exporters.portability import Question
from bipdeploy.model import loading, routes
from bipdeploy.model.blocks import compute_device, compute_dtype
from bipdeploy.model.checkpoint import Checkpoint
from bipdeploy.model.folder import require_own_code
from bipdeploy.ort import folder as onnx_folder
from bipdeploy.ort.quantize import quantize
from bipdeploy.ort.runtime import OnnxModel
from bipdeploy.ort.session import device_of, why_on_cpu
from bipdeploy.planning.job import Job
from bipdeploy.recipe.figures import compared
from bipdeploy.running import artifacts

# Largest difference of logits, as a share of the largest logit, by the type of the graph. Float32:
# the order of sums alone gave 1.7e-4 at 135M parameters.
TOLERANCE = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}
NEW_TOKENS = 32
PROMPTS = 4


def export(job: Job, out: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Write the folder and its quantised copies, and run them. Raises StageError where the graph
    does not agree with the sliced model; of quantised weights the difference is recorded."""
    section, source = job.recipe.export.onnx, Checkpoint(job.inputs["pruned"])
    require_own_code(source.config, trusted=job.recipe.model.trust_remote_code)
    style, dtype = style_and_dtype(job)
    if device_of(job.recipe) != compute_device(job.recipe.model):
        job.reporter.note(f"export.onnx: run on the CPU, not on the GPU: "
                          f"{why_on_cpu(job.recipe)}")
    onnx_folder.write(source, out, style=style, dtype=dtype)
    copies = {name: out.with_name(f"{out.name}-{name}") for name in section.quantize}
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".whole-") as place:
        whole = out
        if copies and dtype != "float32":  # what the quantisers read
            whole = Path(place) / "float32"
            onnx_folder.write(source, whole, dtype="float32", style=style_of(job, "float32"))
        for name, copy in copies.items():
            quantize(whole, copy, name)
    question = portability.draw_question(source.architecture, job.recipe.seed, PROMPTS,
                                         NEW_TOKENS, dtype, str(device_of(job.recipe)))
    reference = portability.reference(source.folder, question)
    expected = sliced_logits(source.folder, question)
    checked = verify(out, question, reference, expected)
    figures = _sizes(job, {"onnx": out, **{f"onnx.{n}": copy for n, copy in copies.items()}}, dtype)
    return figures, {
        "architecture": f"{style} graph in {dtype}", "needs": "onnxruntime 1.24 or later",
        "verified": {"by": "ONNX Runtime, " + checked.pop("by"), **checked},
        "quantized": {name: difference(OnnxModel(copy, question.device), question, expected)
                      for name, copy in copies.items()}}


def style_and_dtype(job: Job) -> tuple[str, str]:
    """The recipe's style and type of the graph, with `auto` decided."""
    device, dtype = device_of(job.recipe), str(job.recipe.export.onnx.dtype)
    if dtype == "auto":
        config = Checkpoint(job.inputs["pruned"]).config
        dtype = str(compute_dtype(job.recipe.model, config, device)).removeprefix("torch.")
        fused = job.recipe.export.onnx.style == "gqa"
        if device.type == "cuda" and (dtype == "bfloat16" or (dtype == "float32" and fused)):
            dtype = "float16"  # not every onnxruntime has all kernels for the others there
    return style_of(job, dtype), dtype


def style_of(job: Job, dtype: str) -> str:
    """The recipe's style of a graph in a type; for `auto` the fused one where its kernel is."""
    style, cuda = str(job.recipe.export.onnx.style), device_of(job.recipe).type == "cuda"
    return style if style != "auto" else "std" if cuda and dtype == "float32" else "gqa"


def verify(written: Path, question: Question, reference: Mapping[str, Any],
           expected: torch.Tensor) -> dict[str, Any]:
    """Logits of a prompt, greedy tokens of a padded batch, and the same in onnxruntime-genai."""
    model = OnnxModel(written, question.device)
    found = difference(model, question, expected)
    allowed = TOLERANCE[question.dtype]
    if not found["relative_logit_difference"] <= allowed:
        raise StageError("the ONNX graph does not agree with the model it was made from: logits "
                         f"differ by {found['relative_logit_difference']:.3g} of the largest, "
                         f"allowed {allowed:g}")
    agreed = portability.compare(reference, answer(model, question, reference), question.dtype)
    if agreed["why"]:
        raise StageError(f"the ONNX graph does not generate as the model it was made from: "
                         f"{agreed['why']}")
    return {"by": f"prefill and {question.new_tokens} greedy tokens of {agreed['prompts']} prompts "
            "in one padded batch", **found, "tokens": agreed,
            "genai": in_genai(written, question, reference)}


def answer(model: OnnxModel, question: Question, reference: Mapping[str, Any]) -> dict[str, Any]:
    """What ONNX Runtime generates for all prompts in one right-padded batch, and how likely it
    finds the tokens of the reference; the form of `serving/probe.py`."""
    longest = max(map(len, question.prompts))
    ids = torch.zeros(len(question.prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(question.prompts):
        ids[row, :len(prompt)], mask[row, :len(prompt)] = torch.tensor(prompt), 1
    tokens = model.generate(ids, question.new_tokens, mask=mask).tolist()
    scored = []
    for prompt, rest in zip(question.prompts, reference["tokens"], strict=True):
        logprobs = model.logits(torch.tensor([prompt + rest]))[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(rest) - 1)
        scored.append([float(logprobs[at, token])
                       for at, token in zip(places, rest, strict=True)])
    return {"tokens": tokens, "scored": scored}


def in_genai(written: Path, question: Question, reference: Mapping[str, Any]) -> dict[str, Any]:
    """The same greedy tokens by onnxruntime-genai, where that is installed."""
    try:
        import onnxruntime_genai as genai
    except ImportError:
        return routes.not_run("onnxruntime-genai is not installed")
    if question.dtype != "float32":
        return routes.not_run("greedy tokens are compared in float32, this is "
                              f"{question.dtype}")
    model = genai.Model(str(written))
    tokens = []
    for prompt in question.prompts:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + question.new_tokens,
                                      min_length=len(prompt) + question.new_tokens,
                                      do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        tokens.append([int(t) for t in generator.get_sequence(0)[len(prompt):]])
    agreed = portability.compare(reference, {"tokens": tokens, "scored": reference["logprobs"]},
                                 question.dtype)
    return {"status": routes.FAILED if agreed["why"] else routes.VERIFIED,
            "why": agreed["why"], "equal_tokens": agreed["equal_tokens"],
            "prompts": agreed["prompts"]}


@torch.inference_mode()
def sliced_logits(sliced: Path, question: Question) -> torch.Tensor:
    """Logits [1, T, V] of the sliced model for the longest prompt, float32 on the CPU."""
    model = loading.load_model(sliced, getattr(torch, question.dtype),
                               torch.device(question.device))
    return model(_longest(question).to(question.device)).logits.float().cpu()


def difference(model: OnnxModel, question: Question, expected: torch.Tensor) -> dict[str, float]:
    """How far a graph's logits for the longest prompt lie from the expected ones."""
    largest = float((model.logits(_longest(question)).cpu() - expected).abs().max())
    return {"largest_logit_difference": largest,
            "relative_logit_difference": largest / float(expected.abs().max())}


def _longest(question: Question) -> torch.Tensor:
    return torch.tensor([max(question.prompts, key=len)])


def _sizes(job: Job, folders: Mapping[str, Path], dtype: str) -> dict[str, float]:
    """Bytes of each folder's weights, beside those of the dense model in the graph's type."""
    if "prune" not in job.inputs:
        return {}
    dense = artifacts.figures([job.inputs["prune"]])["parameters.dense"]
    figures: dict[str, float] = {}
    for prefix, folder in folders.items():
        size = (folder / onnx_folder.DATA).stat().st_size
        figures |= compared(f"{prefix}.bytes", dense * getattr(torch, dtype).itemsize, size)
    return figures

