"""Whether what writes and runs ONNX graphs is installed. Loads none of it."""

from __future__ import annotations

import importlib.util

from bipdeploy.errors import InputError

LIBRARIES = ("onnx", "onnx_ir", "onnxruntime")


def require() -> None:
    """Raise InputError naming the library that is missing, and the extra that brings it."""
    for name in LIBRARIES:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"export.onnx: {name} is not installed; `pip install "
                             "'bipdeploy[onnx]'` for the CPU, 'bipdeploy[onnx-gpu]' for an NVIDIA "
                             "GPU (one of them only)")
