"""Whether what writes and runs ONNX graphs is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from bipdeploy.errors import InputError
from bipdeploy.running.machine import hardware

PACKAGES = ("onnx", "onnx_ir", "onnxruntime")
ON_CPU_ONLY = ("the installed onnxruntime is built for the CPU; uninstall it and "
               "`pip install 'bipdeploy[onnx-gpu]'`, or use auto or cpu")


def require(*packages: str) -> None:
    """Raise InputError where a package that ONNX needs is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{package} is not installed; `pip install 'bipdeploy[onnx]'` for the "
                             "CPU, 'bipdeploy[onnx-gpu]' for an NVIDIA GPU (one of them only)")


def require_for(device: str, dtype: str) -> None:
    """Raise InputError where a recipe asks for CUDA, there is a GPU, and onnxruntime is built for
    the CPU; and where bfloat16 is asked for, and graphs would run on a CPU. A GPU that is missing
    is PyTorch's to report."""
    wanted = device == "cuda" or (device == "auto" and dtype == "bfloat16")
    if not wanted or (device == "cuda" and not hardware()["gpus"]):
        return
    import onnxruntime  # and numpy with it, which no other check loads

    built = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if device == "cuda" and not built:
        raise InputError(f"model.device: cuda was asked for, export.onnx runs there too, and "
                         f"{ON_CPU_ONLY}")
    if device == "auto" and not (built and hardware()["gpus"]):
        raise InputError("export.onnx.dtype: onnxruntime has no bfloat16 on a CPU, where graphs "
                         "run on this machine; use auto, float32 or float16")


def not_on_cuda(style: str, dtype: str, quantized: Iterable[str | None]) -> str | None:
    """Why CUDA cannot run graphs of a style and type, or their quantised copies; or None."""
    if "int8_dynamic" in quantized:
        return "int8_dynamic runs on a CPU only; use int4, or a 16-bit export"
    if style == "gqa" and (dtype == "float32" or any(quantized)):  # copies compute in float32
        return ("GroupQueryAttention has no float32 there; export float16 or bfloat16, or the "
                "style std")
    return None
