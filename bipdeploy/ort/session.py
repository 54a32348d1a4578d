"""Opening a graph in onnxruntime, on the device that was asked for or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bipdeploy.errors import InputError
from bipdeploy.model.blocks import compute_device
from bipdeploy.ort.folder import Contents
from bipdeploy.ort.installed import ON_CPU_ONLY, not_on_cuda, require
from bipdeploy.recipe.recipe import Recipe

DEVICES = ("auto", "cpu", "cuda")
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
# Operators on hidden states: on a GPU they all run there. What counts tokens may stay on the CPU.
HEAVY = {"Attention", "Gemm", "GroupQueryAttention", "MatMul", "MatMulNBits", "RMSNormalization",
         "RotaryEmbedding", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"}
# What graphs need that older versions lack: the operator, and the first version that runs it.
NEEDS = {"std": ("Attention of opset 24", (1, 24)),
         "int4": ("GatherBlockQuantized of 8 bits", (1, 23)),
         "int8": ("GatherBlockQuantized of 8 bits", (1, 23))}


def library() -> Any:
    """The module onnxruntime. Raises InputError where it is not installed."""
    require("onnxruntime")
    import onnxruntime

    return onnxruntime


def check_version(contents: Contents) -> None:
    """Raise InputError where the installed onnxruntime is too old for a folder."""
    version = library().__version__
    numbers = tuple(int(n) for n in version.split(".")[:2])
    for wanted in (contents.style, contents.quantized):
        operator, first = NEEDS.get(wanted or "", ("", (0, 0)))
        if numbers < first:
            raise InputError(f"onnxruntime {version} does not have {operator}, which {wanted} "
                             f"needs; install {'.'.join(map(str, first))} or later")


def device_for(wanted: str, contents: Contents) -> torch.device:
    """The device for a folder; "auto": CUDA where it is there and can run the folder.

    Raises InputError where the one that is asked for is not there, or cannot run it.
    """
    if wanted not in DEVICES:
        raise InputError(f"device {wanted!r} is not known; use {', '.join(DEVICES)}")
    missing = no_cuda() or not_on_cuda(contents.style, contents.dtype, [contents.quantized])
    if wanted == "cuda" and missing:
        raise InputError(f"device cuda was asked for, and {missing}")
    if wanted == "cuda" or (wanted == "auto" and not missing):
        return torch.device("cuda", 0)
    if contents.dtype == "bfloat16":
        raise InputError("onnxruntime has no bfloat16 on a CPU; export float32 or float16, or run "
                         "on an NVIDIA GPU")
    return torch.device("cpu")


def device_of(recipe: Recipe) -> torch.device:
    """Where a recipe's graphs are run: on its device. For `auto` that is the CPU, also beside a GPU
    that PyTorch uses, where onnxruntime has no CUDA or one of the graphs cannot run there."""
    device = compute_device(recipe.model)
    return torch.device("cpu") if recipe.model.device == "auto" and why_on_cpu(recipe) else device


def why_on_cpu(recipe: Recipe) -> str | None:
    """Why CUDA cannot run all of a recipe's graphs, or None."""
    onnx = recipe.export.onnx
    return no_cuda() or not_on_cuda(onnx.style, onnx.dtype, onnx.quantize)


def no_cuda() -> str | None:
    """Why there is no CUDA here, or None."""
    if CUDA not in library().get_available_providers():
        return ON_CPU_ONLY
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA GPU here; use auto or cpu"
    return None


def open_session(path: Path, device: torch.device, threads: int | None = None) -> Any:
    """An `InferenceSession` whose work is on `device`. `threads`: None leaves it to onnxruntime.

    Raises InputError where onnxruntime cannot run the graph, or not there.
    """
    ort = library()
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}; give 1 or more, or none for onnxruntime's choice")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # its warnings are about placing small nodes
    options.intra_op_num_threads = threads or 0
    if device.type == "cuda":
        ort.preload_dlls()
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # As much of the GPU's memory as is asked for; by default the arena doubles.
    providers: list[Any] = [(CUDA, {"arena_extend_strategy": "kSameAsRequested"}), CPU]
    if device.type != "cuda":
        providers = [CPU]
    try:
        session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # its exceptions have no common class
        raise InputError(f"{path}: onnxruntime {ort.__version__} does not run this graph on "
                         f"{device.type}: {_cause(error)}; install a newer onnxruntime, or export "
                         "another style or type") from error
    if device.type == "cuda" and CUDA not in session.get_providers():
        raise InputError(f"onnxruntime {ort.__version__}, built for CUDA {built_for(ort)}, could "
                         f"not start {CUDA} beside PyTorch {torch.__version__}, built for CUDA "
                         f"{torch.version.cuda}: the first numbers of both have to be the same; "
                         "install another onnxruntime-gpu, or use device cpu")
    if device.type == "cuda":
        stray = heavy_on(session, CPU)
        if stray:
            raise InputError(f"{path}: onnxruntime {ort.__version__} has no CUDA kernel for "
                             f"{', '.join(stray)}; install a newer one, or use device cpu")
    return session


def built_for(library: Any) -> str:
    """The version of CUDA that an onnxruntime is built for."""
    return str(getattr(library, "cuda_version", None) or "(unknown version)")


def heavy_on(session: Any, provider: str) -> list[str]:
    """The kinds of heavy operators that a session runs on a provider."""
    return sorted({node.op_type for part in session.get_provider_graph_assignment_info()
                   if part.ep_name == provider for node in part.get_nodes()} & HEAVY)


def _cause(error: Exception) -> str:
    """The line of an onnxruntime error that says why, which names the operator."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].rpartition("] : ")[2].strip()[:300] if lines else type(error).__name__
